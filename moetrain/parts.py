"""Parts that a config names by class: found, checked against their own signature, and built.

A part is a mapping with a ``_target_``, the dotted path of a class, and perhaps an ``_about_``, which says where it
comes from; its other keys are keyword-only parameters of that class. A config must not be able to run just any code, so
a target is imported from moetrain and from packages that ``machine.allow_modules`` names, and from nowhere else.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import traceback
import typing
from collections.abc import Collection, Mapping, Sequence
from types import ModuleType
from typing import Any

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass as pydantic_dataclass

from moetrain.config import STRICT, AboutPart, Part
from moetrain.problems import MISSING, field_problems, nearest
from moetrain.types import ConfigError, Problem

TARGET, ABOUT = "_target_", "_about_"


def resolve(target: str, allow: Sequence[str]) -> type:
    """The class at the dotted path ``target``.

    Raises ConfigError with one problem (field ``_target_``) if it lies outside moetrain and ``allow``, can't be found,
    or is no class.
    """
    path, _, name = target.rpartition(".")
    if not _within(path, allow):
        raise _refusal(target, "lies outside of moetrain and machine.allow_modules", _permission(target))
    if not all(part.isidentifier() and not part.startswith("__") for part in target.split(".")):
        raise _refusal(target, "is no dotted path of plain names", "write package.module.Class")
    module = _import(target, path)
    found = getattr(module, name, None)
    if not inspect.isclass(found):
        classes = [key for key, value in vars(module).items() if inspect.isclass(value)]
        near = nearest(name, classes)
        fix = f"write {path}.{near}" if near else f"name a class of {path}"
        raise _refusal(target, f"{path} has no class {name!r}", fix)
    if not _within(found.__module__, allow):
        reason = f"is a class of {found.__module__}, which lies outside of moetrain and machine.allow_modules"
        raise _refusal(target, reason, _permission(found.__module__))
    return found


def build(part: Part, allow: Sequence[str], **context: object) -> Any:
    """The object that ``part`` describes: its class called with the part's own parameters and with ``context``.

    ``context`` are keyword-only parameters that the caller supplies and that a user may not set. Raises ConfigError.
    """
    problems = part_problems("part", part, allow, None, tuple(context))
    if problems:
        raise ConfigError(problems)
    found = resolve(part[TARGET], allow)
    return found(**parameters(found, part, tuple(context)), **context)


def parameters(found: type, part: Part, context_names: Collection[str]) -> dict[str, Any]:
    """The user's parameters of a part that has no problems, defaults filled in."""
    own = json.dumps({k: value for k, value in part.items() if k not in (TARGET, ABOUT) and value != MISSING})
    checked: Any = TypeAdapter(_schema(found, context_names)).validate_json(own, strict=True)
    return {field.name: getattr(checked, field.name) for field in dataclasses.fields(checked)}


def part_problems(
    section: str, part: object, allow: Sequence[str], num_experts: int | None, context_names: Collection[str]
) -> list[Problem]:
    """What is wrong with a part: its target, its keys and values, and what its class says of them together.

    A class says it by a static ``problems(*, num_experts, **own parameters) -> list[Problem]``, asked only when the
    rest is right and ``num_experts`` is known.
    """
    if not isinstance(part, Mapping):
        return [Problem(section, part, "is a section with keys of its own, not a value", f"set {section}.{TARGET}=...")]
    target = part.get(TARGET)
    if not isinstance(target, str):
        fix = f"choose {section}=NAME, or set {section}.{TARGET}=package.module.Class"
        return [Problem(f"{section}.{TARGET}", target, "must be the dotted path of a class", fix)]
    try:
        found = resolve(target, allow)
        schema = _schema(found, context_names)
    except ConfigError as error:
        return [dataclasses.replace(problem, field=f"{section}.{problem.field}") for problem in error.problems]
    own = {key: value for key, value in part.items() if key not in (TARGET, ABOUT)}
    supplied = [key for key in own if key in context_names]
    problems = [_supplied(section, key, own.pop(key)) for key in supplied]
    problems += field_problems(section, schema, own)
    if ABOUT in part:
        problems += field_problems(f"{section}.{ABOUT}", AboutPart, part[ABOUT])
    if not problems and num_experts is not None and hasattr(found, "problems"):
        own = parameters(found, dict(part), context_names)
        try:
            problems += found.problems(num_experts=num_experts, **own)
        except Exception as error:  # the class may be anybody's
            problems.append(failing(f"{section}.{TARGET}", target, "problems", error))
    return problems


def failing(field: str, target: str, method: str, error: Exception) -> Problem:
    """A class whose ``method`` raised when it was asked about its settings."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    reason = f"its {method}() raised {type(error).__name__}: {error} ({where.filename}, line {where.lineno})"
    return Problem(field, target, reason, "correct that class")


def _schema(found: type, context_names: Collection[str]) -> type:
    """A strict dataclass made of the keyword-only parameters of ``found``, without those that the caller supplies."""
    target = f"{found.__module__}.{found.__qualname__}"
    signature = inspect.signature(found).parameters
    loose = [p.name for p in signature.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    lacking = [name for name in context_names if name not in signature]
    if loose:
        raise _refusal(target, f"its parameters {', '.join(loose)} aren't keyword-only", "put `*,` before them")
    if lacking:
        raise _refusal(
            target, f"lacks the parameters {', '.join(lacking)}", "add them, keyword-only: moetrain supplies them"
        )
    hints = typing.get_type_hints(found.__init__)  # type: ignore[misc]
    own = [p for p in signature.values() if p.name not in context_names]
    required = [(p.name, hints.get(p.name, Any)) for p in own if p.default is p.empty]
    optional = [(p.name, hints.get(p.name, Any), _default(p.default)) for p in own if p.default is not p.empty]
    plain = dataclasses.make_dataclass(found.__name__, [*required, *optional], kw_only=True)
    return pydantic_dataclass(plain, config=STRICT)


def _default(value: object) -> Any:
    """A default as a dataclass takes it, which refuses a bare list or dict."""
    return dataclasses.field(default_factory=lambda: value) if isinstance(value, (list, dict)) else value


def _import(target: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not (path == error.name or path.startswith(error.name + ".")):
            raise _refusal(target, f"importing {path} failed: {error}", "install what it imports") from error
        raise _refusal(target, f"there is no module {error.name}", "correct the dotted path") from error
    except ImportError as error:
        raise _refusal(target, f"importing {path} failed: {error}", "correct that module") from error


def _within(path: str, allow: Sequence[str]) -> bool:
    return any(path == root or path.startswith(root + ".") for root in ("moetrain", *allow))


def _permission(path: str) -> str:
    package = path.partition(".")[0]
    return f"if you trust the package, set 'machine.allow_modules=[{package}]'"


def _refusal(target: str, reason: str, fix: str) -> ConfigError:
    return ConfigError([Problem(TARGET, target, reason, fix)])


def _supplied(section: str, key: str, value: object) -> Problem:
    return Problem(f"{section}.{key}", value, "is supplied by moetrain itself", f"leave {section}.{key} out")
