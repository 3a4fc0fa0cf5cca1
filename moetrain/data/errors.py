"""The one way in which this room refuses: an exception that names field, value, reason and fix."""

from __future__ import annotations

from moetrain.types import ConfigError, Problem


def refusal(field: str, value: object, reason: str, fix: str) -> ConfigError:
    """A ConfigError (a ValueError) with a single problem, to be raised by the caller."""
    return ConfigError([Problem(field, value, reason, fix)])
