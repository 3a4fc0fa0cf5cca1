"""From what a user types to a checked ``Config``: the only file that knows Hydra.

A group choice on the command line replaces the whole section: neither the recipe's choice nor the values that the
recipe sets in that section survive. Values on the command line go over everything. So ``recipe=quickstart model=small``
is conf/model/small.yaml exactly, in an otherwise unchanged recipe.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from moetrain.checks import parse, problems_of
from moetrain.config import AboutPart, Config
from moetrain.parts import ABOUT
from moetrain.problems import unknown_option
from moetrain.redaction import held
from moetrain.types import ConfigError, Problem

RECIPE, ROUTER = "recipe", "router"
_FAILURES = (HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError, RecursionError)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One override, understood. ``group`` is None where it sets a value; ``text`` is what Hydra gets."""

    text: str
    typed: str
    group: str | None


@dataclasses.dataclass(frozen=True)
class Composed:
    """A checked config, and what the router's option says of itself, which is no part of it; None: nothing."""

    config: Config
    about: AboutPart | None


def compose(overrides: Sequence[str], world_size: int | None = None, config_dir: str | None = None) -> Config:
    """The config of ``compose_with_about``."""
    return compose_with_about(overrides, world_size, config_dir).config


def compose_with_about(overrides: Sequence[str], world_size: int | None, config_dir: str | None) -> Composed:
    """The config that ``overrides`` (as typed) describe, over conf/train.yaml. Raises ConfigError with all problems.

    ``world_size``: the ranks that will run it; None: as many as the recipe says. ``config_dir``: a folder with options
    of the user's own, in sub-folders named after the groups (``recipe`` is one).
    """
    if unusable := _config_dir_problems(config_dir):
        raise ConfigError(unusable)
    problems: list[Problem] = []
    choices: list[Choice] = []
    for text in overrides:
        understood = _understand(text, config_dir)
        if isinstance(understood, Problem):
            problems.append(understood)
        else:
            choices.append(understood)
    with _hydra():
        container = _container(choices, config_dir)
        if isinstance(container, Problem):
            choices, found = _sieve(choices, config_dir)
            problems += found
            container = _container(choices, config_dir)
    if isinstance(container, Problem):
        raise ConfigError([*problems, container])
    if exposed := secret_problems(container):
        raise ConfigError(exposed)
    problems += about_problems(ROUTER, container.get(ROUTER), config_dir)
    if problems:
        raise ConfigError([*problems, *problems_of(container, world_size, _unsure(choices, problems))])
    config, about = parse(container, world_size), container[ROUTER].get(ABOUT)
    return Composed(config, None if about is None else AboutPart(**about))


def resolved_yaml(config: Config) -> str:
    """The whole config as YAML, every value spelt out, sections in the order of ``Config``."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def quoted(text: str) -> str:
    """A value that Hydra's grammar reads as ``text``, whatever is in it."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def options(group: str, config_dir: str | None = None) -> list[str]:
    """The names that can be chosen for a group: moetrain's and those in ``config_dir``."""
    names = {path.stem for folder in _folders(config_dir) for path in folder.glob(f"{group}/*.yaml")}
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def option_values(group: str, names: Sequence[str], config_dir: str | None = None) -> dict[str, Any]:
    """Option -> its values as plain data, for some options of a group; nothing is checked.

    Raises ConfigError with a problem for each file that can't be read.
    """
    if unusable := _config_dir_problems(config_dir):
        raise ConfigError(unusable)
    found: dict[str, Any] = {}
    problems: list[Problem] = []
    with _hydra():
        for name in names:
            try:
                composed = hydra.compose(overrides=[f"+{group}={name}", *_search_path(config_dir)])
                found[name] = OmegaConf.to_container(composed, resolve=True)[group]  # type: ignore[index,call-overload]
            except _FAILURES as error:
                problems.append(Problem(group, name, _sentence(error), "correct that file"))
    if problems:
        raise ConfigError(problems)
    return found


def about_problems(section: str, part: object, config_dir: str | None = None) -> list[Problem]:
    """Options of conf/balance and conf/capacity that a part names under ``_about_`` and that do not exist."""
    about = part.get(ABOUT) if isinstance(part, Mapping) else None
    named = {group: about.get(group) for group in ("balance", "capacity")} if isinstance(about, Mapping) else {}
    found = [
        unknown_option(group, name, options(group, config_dir))
        for group, name in named.items()
        if isinstance(name, str) and name not in options(group, config_dir)
    ]
    return [dataclasses.replace(problem, field=f"{section}.{ABOUT}.{problem.field}") for problem in found]


def secret_problems(container: Mapping[str, Any]) -> list[Problem]:
    """Values that hold a secret of the environment, by ``${oc.env:...}`` or typed: a config is written and shown.

    Other variables may be named, since where things lie is the environment's business.
    """
    found = []
    for section, values in container.items():
        for key, value in values.items() if isinstance(values, Mapping) else [("", values)]:
            if (name := held(str(value))) is not None:
                fix = f"leave it out: whatever needs {name} reads it from the environment"
                found.append(Problem(f"{section}.{key}", "***", f"holds the secret of {name}", fix))
    return found


def conf_folder() -> Path:
    """conf/ as it lies in an installed wheel, or at the top of the checkout."""
    installed = Path(__file__).parent / "conf"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "conf"


def _folders(config_dir: str | None) -> list[Path]:
    return [conf_folder(), *([] if config_dir is None else [Path(config_dir)])]


def _groups() -> set[str]:
    return {path.parent.name for path in conf_folder().glob("*/*.yaml")}


@contextmanager
def _hydra() -> Iterator[None]:
    """Hydra with conf/ as its primary folder. 1.4 dropped ``version_base``, 1.3 acts like 1.1 without it."""
    old = tuple(int(number) for number in hydra.__version__.split(".")[:2]) < (1, 4)
    with hydra.initialize_config_dir(config_dir=str(conf_folder()), **({"version_base": "1.3"} if old else {})):
        yield


def _understand(text: str, config_dir: str | None) -> Choice | Problem:
    """One override as Hydra shall see it, or what is wrong with it.

    A value is handed over as ``++key=value``: Hydra then takes any key, and the schema is the one judge of keys.
    """
    field, _, value = text.partition("=")
    try:
        override = OverridesParser.create().parse_override(text)
    except (HydraException, RecursionError):
        fix = "write key=value; quote a value that has spaces or any of ,{}[]() in it: 'key=\"a value\"'"
        reason = "isn't an override that Hydra's grammar can read" if "=" in text else "has no '=' and no value"
        return Problem(field, value, reason, fix)
    key = override.key_or_group
    if override.is_sweep_override():
        return _sweep(key, value)
    if key.partition(".")[0] == "hydra":
        fix = "leave it out; use --config-dir for configs of your own and run.root for the output folder"
        return Problem(key, value, "moetrain composes its config by itself and reads no hydra.* settings", fix)
    if override.is_delete():
        return Choice(text, text, None)
    if key in _groups():
        return _group_choice(override, text, config_dir)
    return Choice(f"++{text.lstrip('+')}", text, None)


def _group_choice(override: Override, text: str, config_dir: str | None) -> Choice | Problem:
    group, option = override.key_or_group, override.value()
    known = options(group, config_dir)
    if option in known or (group == RECIPE and option is None):
        return Choice(text.lstrip("+"), text, group)
    return unknown_option(group, option, known)


def _sweep(key: str, value: str) -> Problem:
    """Of ``key=a,b``: a group has one option, a value may be meant as a list."""
    fix = f"write {key}=[{value}] for a list, or one"
    if key in _groups():
        fix = f"choose one, {key}={value.partition(',')[0]}, say"
        fix += f"; to train them all and compare: moetrain routers compare {key}={value}" if key == ROUTER else ""
    return Problem(key, value, "is a sweep, and one run takes one value", fix)


def _compose(choices: Sequence[Choice], config_dir: str | None) -> DictConfig:
    texts = [choice.text for choice in choices]
    return hydra.compose(config_name="train", overrides=[*texts, *_search_path(config_dir)])


def _search_path(config_dir: str | None) -> list[str]:
    """The override that adds ``config_dir``; none for None."""
    return [] if config_dir is None else [f"hydra.searchpath=[{quoted(f'file://{Path(config_dir).resolve()}')}]"]


def _container(choices: Sequence[Choice], config_dir: str | None) -> dict[str, Any] | Problem:
    """All sections as plain values, the command line's group choices over the recipe's values; or why Hydra can't."""
    chosen = {choice.group for choice in choices if choice.group is not None}
    try:
        composed = _compose(choices, config_dir)
        if RECIPE in chosen and len(chosen) > 1:
            bare = _compose([choice for choice in choices if choice.group != RECIPE], config_dir)
            for group in chosen - {RECIPE}:
                composed[group] = bare[group]
        container = OmegaConf.to_container(composed, resolve=True)
    except _FAILURES as error:
        field = getattr(error, "full_key", None) or "configuration"
        return Problem(field, None, _sentence(error), "correct the file or the override that it comes from")
    assert isinstance(container, dict)
    return {str(name): section for name, section in container.items()}


def _sieve(choices: Sequence[Choice], config_dir: str | None) -> tuple[list[Choice], list[Problem]]:
    """The choices that compose, added one by one, groups first; and a problem for each that doesn't."""
    good: list[Choice] = []
    problems: list[Problem] = []
    for choice in sorted(choices, key=lambda choice: choice.group is None):
        outcome = _container([*good, choice], config_dir)
        if isinstance(outcome, Problem):
            field, _, value = choice.typed.partition("=")
            problems.append(Problem(field.lstrip("+~"), value, outcome.reason, "correct it, or leave it out"))
        else:
            good.append(choice)
    return good, problems


def _unsure(choices: Sequence[Choice], problems: Sequence[Problem]) -> set[str]:
    """Sections that don't hold what the user meant, because their choice failed, or the recipe's, which may set any."""
    failed = {problem.field for problem in problems} & _groups()
    if RECIPE not in failed:
        return failed
    return {field.name for field in dataclasses.fields(Config)} - {str(choice.group) for choice in choices}


def _config_dir_problems(config_dir: str | None) -> list[Problem]:
    if config_dir is None:
        return []
    if not Path(config_dir).is_dir():
        return [Problem("--config-dir", config_dir, "is no folder", "name a folder with GROUP/NAME.yaml files in it")]
    own, shipped = Path(config_dir), conf_folder()
    twice = sorted(path.relative_to(own) for path in own.glob("*/*.yaml") if (shipped / path.relative_to(own)).exists())
    return [Problem("--config-dir", str(path), "moetrain ships an option of this name", "rename it") for path in twice]


def _sentence(error: Exception) -> str:
    """The first line of an error's text, without a full stop; file and line of a file that is no YAML."""
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}: no YAML, {error.problem}"
    return str(error).strip().splitlines()[0].rstrip(".:")
