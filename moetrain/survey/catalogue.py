"""Every option of conf/router, and what is known of it without building it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moetrain.checks import CONTEXT, router_traits
from moetrain.compose import ROUTER, about_problems, option_values, options
from moetrain.config import AboutPart, Config, Part
from moetrain.parts import ABOUT, TARGET, parameters, part_problems, resolve
from moetrain.problems import field_problems
from moetrain.types import ConfigError, RouterTraits

Settings = tuple[str, dict[str, Any]]
"""A class by its path, and its own parameters."""


@dataclass(frozen=True)
class RouterRow:
    """One option. about: None where the file has none. traits: None where it can't work with these experts.

    faults: in words, what is missing or why it can't work, and what to do. settings: what the class is called with,
    defaults filled in; None as traits. same_as: other options of the same class and settings.
    """

    name: str
    about: AboutPart | None
    traits: RouterTraits | None
    faults: tuple[str, ...]
    settings: Settings | None = None
    same_as: tuple[str, ...] = ()


def catalogue(config: Config, config_dir: str | None) -> list[RouterRow]:
    """A row for each option, for as many experts as ``config`` has and the modules that it allows. Raises ConfigError
    where a file can't be read.
    """
    values = option_values(ROUTER, options(ROUTER, config_dir), config_dir)
    rows = [_row(name, section, config, config_dir) for name, section in values.items()]
    return [replace(row, same_as=_same_as(row, rows)) for row in rows]


def settings_of(part: Part, allow: Sequence[str]) -> Settings:
    """Of a router without problems. Two options with equal ones are one router."""
    return part[TARGET], parameters(resolve(part[TARGET], allow), part, CONTEXT[ROUTER])


def about_of(values: object) -> AboutPart | None:
    """What an option says of itself; None where it says nothing, or not what is expected."""
    about = values.get(ABOUT) if isinstance(values, Mapping) else None
    if about is None or field_problems(ABOUT, AboutPart, about):
        return None
    return AboutPart(**about)


def _row(name: str, values: Any, config: Config, config_dir: str | None) -> RouterRow:
    num_experts, allow = config.experts.num_experts, config.machine.allow_modules
    about = about_of(values)
    problems = part_problems(ROUTER, values, allow, num_experts, CONTEXT[ROUTER])
    traits, settings = None, None
    if not problems:
        try:
            traits, settings = router_traits(values, num_experts, allow), settings_of(values, allow)
        except ConfigError as error:
            problems = list(error.problems)
    problems += about_problems(ROUTER, values, config_dir)
    faults = tuple(f"{problem.field}: {problem.reason}; {problem.fix}" for problem in problems)
    if about is None and not problems:
        faults = (f"the file has no {ABOUT} with paper and balance",)
    return RouterRow(name, about, traits, faults, settings)


def _same_as(row: RouterRow, rows: Sequence[RouterRow]) -> tuple[str, ...]:
    same = [other for other in rows if row.settings is not None and other.settings == row.settings]
    return tuple(other.name for other in same if other is not row)
