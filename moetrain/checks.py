"""From a plain mapping to a checked ``Config``, or to every problem in it at once."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, get_type_hints

from pydantic import TypeAdapter

from moetrain.config import Config, Part
from moetrain.parts import ABOUT, TARGET, failing, parameters, part_problems, resolve
from moetrain.problems import MISSING, field_problems, nearest, typed
from moetrain.rules import rule_problems
from moetrain.rules.layout import fitted_ep_size, fitted_micro_batch
from moetrain.types import ConfigError, Problem, RouterTraits

CONTEXT = {"router": ("site",), "dispatch": ("num_experts", "mesh", "timeline")}


def parse(container: dict[str, Any], world_size: int | None) -> Config:
    """The checked config of ``container``, plain sections of plain values. Raises ConfigError with all problems.

    ``world_size``: the ranks that will run it; None: ``recipe.world``. ``debug.fake_world`` goes before either.
    """
    problems = problems_of(container, world_size)
    if problems:
        raise ConfigError(problems)
    return TypeAdapter(Config).validate_json(json.dumps(_given(container)), strict=True)


def problems_of(container: dict[str, Any], world_size: int | None, unsure: Collection[str] = ()) -> list[Problem]:
    """Every problem of ``container``: fields by themselves first, then rules over those that are right by themselves.

    Sections in ``unsure`` don't hold what the user meant, because choosing them was a mistake. What was typed for them
    is still judged key by key, but no rule looks at them, nor is a part judged whose class is then unknown.
    """
    sections = get_type_hints(Config)
    problems = _unknown_sections(container, sections)
    values: dict[str, Any] = {}
    for name in [name for name in sections if name not in CONTEXT]:
        raw, kind = container.get(name, {}), sections[name]
        found = field_problems(name, kind, raw)
        values |= _right_values(name, _defaults(kind), raw, found)
        problems += found
    for name in [name for name in CONTEXT if name not in unsure]:
        allow, num_experts = values.get("machine.allow_modules", []), values.get("experts.num_experts")
        found = part_problems(name, container.get(name, {}), allow, num_experts, CONTEXT[name])
        found += [] if found or name != "router" else _traits_problems(container[name], num_experts, allow)
        values |= _right_part(name, container.get(name, {}), allow, num_experts, found)
        problems += found
    values = {field: value for field, value in values.items() if field.partition(".")[0] not in unsure}
    world = _world(values.get("debug.fake_world"), world_size, values.get("recipe.world"))
    return problems + _news(rule_problems(values | ({} if world is None else {"world": world})), problems)


def traits_of(config: Config) -> RouterTraits:
    """What the router of a checked config says of itself."""
    return router_traits(config.router, config.experts.num_experts, config.machine.allow_modules)


def router_traits(part: Part, num_experts: int, allow: Sequence[str]) -> RouterTraits:
    """What a router without problems says of itself among ``num_experts`` experts. Raises ConfigError if it can't."""
    found = resolve(part[TARGET], allow)
    own = parameters(found, part, CONTEXT["router"])
    field, fix = f"router.{TARGET}", "subclass moetrain.moe.routers.base.Router"
    if not hasattr(found, "traits"):
        reason = "is no router: it has no static traits(*, num_experts, ...)"
        raise ConfigError([Problem(field, part[TARGET], reason, fix)])
    try:
        traits = found.traits(num_experts=num_experts, **own)
    except Exception as error:  # the class may be anybody's
        raise ConfigError([failing(field, part[TARGET], "traits", error)]) from error
    if not isinstance(traits, RouterTraits):
        reason = f"its traits() gives {typed(type(traits).__name__)}, not RouterTraits"
        raise ConfigError([Problem(field, part[TARGET], reason, "return a moetrain.types.RouterTraits")])
    return traits


def world_of(config: Config, world_size: int | None) -> int:
    """The number of ranks that ``config`` is checked and run for; see ``parse``."""
    world = _world(config.debug.fake_world, world_size, config.recipe.world)
    assert world is not None
    return world


def ep_size_of(config: Config, world_size: int) -> int:
    """Ranks over which the experts of a layer are sharded: ``engine.ep_size``.

    When that is null: the largest divisor of ``world_size`` that divides the number of experts.
    """
    return config.engine.ep_size or fitted_ep_size(None, config.experts.num_experts, world_size)


def fitted(config: Config, world_size: int) -> Config:
    """A checked config as ``world_size`` ranks run it: with ``run.elastic``, EP size and micro-batch lowered to what
    fits them, the global batch kept by accumulation.
    """
    if not config.run.elastic:
        return config
    engine, train = config.engine, config.train
    micro_batch = fitted_micro_batch(train.micro_batch, train.global_batch, world_size)
    assert micro_batch is not None, "the rules refuse such a world"
    ep_size = fitted_ep_size(engine.ep_size, config.experts.num_experts, world_size)
    return replace(config, engine=replace(engine, ep_size=ep_size), train=replace(train, micro_batch=micro_batch))


def refit(config: Config, world_size: int, before: int | None = None) -> str:
    """What ``run.elastic`` changes for ``world_size`` ranks, in words; "" for nothing. before: the number of ranks that
    it is compared with; None: with what was typed.
    """
    if not config.run.elastic or (before is not None and config.train.global_batch % before):
        return ""
    new = _layout(fitted(config, world_size), world_size)
    if before is None:
        old = {"ep_size": config.engine.ep_size or new["ep_size"], "micro_batch": config.train.micro_batch}
    else:
        old = _layout(fitted(config, before), before)
    changes = [f"{name} {old[name]} -> {new[name]}" for name in old if old[name] != new[name]]
    return f"elastic: {', '.join(changes)}" if changes else ""


def _layout(config: Config, world_size: int) -> dict[str, int]:
    """Of a config that is fitted to the ranks."""
    train = config.train
    accumulation = train.global_batch // (world_size * train.micro_batch)
    ep_size = ep_size_of(config, world_size)
    return {"ranks": world_size, "ep_size": ep_size, "micro_batch": train.micro_batch, "accumulation": accumulation}


def _world(fake: int | None, world_size: int | None, recipe: int | None) -> int | None:
    return fake or world_size or recipe


def _unknown_sections(container: dict[str, Any], sections: dict[str, Any]) -> list[Problem]:
    problems = []
    for name in [name for name in container if name not in sections]:
        near = nearest(name, sections)
        for field, value in _leaves(name, container[name]):
            known = (
                f"write {field.replace(name, near, 1)}={typed(value)}" if near else f"choose of {', '.join(sections)}"
            )
            problems.append(Problem(field, value, f"there is no section {name!r}", known))
    return problems


def _leaves(field: str, value: object) -> list[tuple[str, object]]:
    if isinstance(value, dict) and value:
        return [leaf for key, inner in value.items() for leaf in _leaves(f"{field}.{key}", inner)]
    return [(field, value)]


def _given(container: dict[str, Any]) -> dict[str, Any]:
    """``container`` without what a part says of itself, and without the values that are missing (``???``), which fall
    to the schema's defaults.
    """
    return {
        name: {k: v for k, v in section.items() if v != MISSING and k != ABOUT} for name, section in container.items()
    }


def _defaults(schema: type) -> dict[str, Any]:
    fields = schema.__pydantic_fields__.items()  # type: ignore[attr-defined]
    return {name: field.get_default(call_default_factory=True) for name, field in fields if not field.is_required()}


def _right_values(section: str, defaults: dict[str, Any], raw: object, problems: list[Problem]) -> dict[str, Any]:
    """``section.key`` -> value, for the keys that no problem names."""
    given = {key: value for key, value in raw.items() if value != MISSING} if isinstance(raw, dict) else {}
    wrong = {problem.field.split(".")[1] for problem in problems if "." in problem.field}
    merged = {} if problems and not isinstance(raw, dict) else defaults | given
    return {f"{section}.{key}": value for key, value in merged.items() if key not in wrong}


def _right_part(
    section: str, part: object, allow: list[str], num_experts: int | None, problems: list[Problem]
) -> dict[str, Any]:
    if any(problem.field in (section, f"{section}.{TARGET}") for problem in problems):
        return {}
    if problems or not isinstance(part, dict):
        return _right_values(section, {}, part, problems)
    found = resolve(part[TARGET], allow)
    own = parameters(found, part, CONTEXT[section])
    values = _right_values(section, own, part, problems)
    if section == "router" and num_experts is not None:
        values["router.traits"] = router_traits(part, num_experts, allow)
    return values


def _traits_problems(part: Part, num_experts: int | None, allow: Sequence[str]) -> list[Problem]:
    if num_experts is None:
        return []
    try:
        router_traits(part, num_experts, allow)
    except ConfigError as error:
        return list(error.problems)
    return []


def _news(problems: list[Problem], known: list[Problem]) -> list[Problem]:
    """Problems of fields that nothing has been said of yet."""
    said = {problem.field for problem in known}
    return [problem for problem in problems if problem.field not in said]
