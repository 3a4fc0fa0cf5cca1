"""Every option of conf/router, and what is known of it without building it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moetrain.checks import CONTEXT, router_traits
from moetrain.compose import option_values, options
from moetrain.config import AboutPart, Config
from moetrain.parts import ABOUT, part_problems
from moetrain.problems import field_problems
from moetrain.types import RouterTraits

ROUTER = "router"


@dataclass(frozen=True)
class RouterRow:
    """One option. about: None where the file has none. traits: None where it can't work with these experts.

    faults: in words, what is missing or why it can't work.
    """

    name: str
    about: AboutPart | None
    traits: RouterTraits | None
    faults: tuple[str, ...]


def catalogue(config: Config, config_dir: str | None) -> list[RouterRow]:
    """A row for each option, for as many experts as ``config`` has and the modules that it allows. Raises ConfigError
    where a file can't be read.
    """
    values = option_values(ROUTER, options(ROUTER, config_dir), config_dir)
    return [_row(name, section, config) for name, section in values.items()]


def about_of(values: object) -> AboutPart | None:
    """What an option says of itself; None where it says nothing, or not what is expected."""
    about = values.get(ABOUT) if isinstance(values, Mapping) else None
    if about is None or field_problems(ABOUT, AboutPart, about):
        return None
    return AboutPart(**about)


def _row(name: str, values: Any, config: Config) -> RouterRow:
    num_experts, allow = config.experts.num_experts, config.machine.allow_modules
    about = about_of(values)
    problems = part_problems(ROUTER, values, allow, num_experts, CONTEXT[ROUTER])
    traits = None if problems else router_traits(values, num_experts, allow)
    faults = tuple(f"{problem.field}: {problem.reason}" for problem in problems)
    if about is None and not problems:
        faults = (f"the file has no {ABOUT} with paper and balance",)
    return RouterRow(name, about, traits, faults)
