"""Secrets stay where they are: what this process must never write, and how it is struck out of what it does write."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping

NAME = re.compile(r"(?i)(?:^|_)(?:apikey|key|token|secret|password|passwd|credentials?)(?:_|$)")
"""Environment variables of such names hold secrets."""
LEAST = 8
"""Characters. Shorter ones are no secrets, and would be found everywhere."""
_LITERAL = re.compile(r"((?:key|token|secret|password|passwd|credential)[\"']?\]?\s*[=:]\s*[\"'])[^\"'\s]{8,}", re.I)
_EXPORTED = re.compile(r"(\b[A-Z0-9_]*(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)=)[^\s\"']{8,}")
_KNOWN = re.compile(r"\b(?:[0-9a-f]{40}|wandb_v1_\w{20,}|hf_\w{20,}|gh[opsu]_\w{20,}|sk-[\w-]{20,}|AKIA[0-9A-Z]{16})\b")
_IN_ADDRESS = re.compile(r"(\w+://[^\s/@]*:)[^\s/@]+@")


def secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Name -> value of the variables that hold secrets."""
    return {name: value for name, value in environment.items() if NAME.search(name) and len(value) >= LEAST}


def held(text: str) -> str | None:
    """The name of an environment variable whose secret is in ``text``, if any is."""
    return next((name for name, value in secrets(os.environ).items() if value in text), None)


def redact(text: str) -> str:
    """``text`` without the secrets of the environment, and without passwords in addresses."""
    for name, value in secrets(os.environ).items():
        text = text.replace(value, f"***{name}***")
    return _IN_ADDRESS.sub(r"\1***@", text)


def redact_source(text: str) -> str:
    """Source code: also without what looks like a key, and literals that are given a name which sounds like one."""
    return _KNOWN.sub("***", _EXPORTED.sub(r"\1***", _LITERAL.sub(r"\1***", redact(text))))


class Redacted(logging.Formatter):
    """For a log: whoever logs what, and with whatever traceback."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
