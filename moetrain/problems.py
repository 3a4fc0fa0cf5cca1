"""The user's mistakes in words: pydantic's errors as ``Problem`` values, and how a list of them is printed."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from moetrain.types import Problem

MISSING = "???"
_DEPTHS = "Mixture of Depths is no router, it decides which tokens pass a layer at all: model.depth_every=2"
_SOFT = "it is left out: its slots are mixtures of all tokens, so there is no assignment to count, limit or dispatch"
_NO_ROUTER = {**dict.fromkeys(("mod", "mixtureofdepths", "depth", "depths"), _DEPTHS), "softmoe": _SOFT, "soft": _SOFT}

_EXPECTED = {
    bool: ("true or false", "true"),
    int: ("a whole number", "1"),
    float: ("a number", "0.1"),
    str: ("text", "name"),
    list: ("a list", "[a,b]"),
}
_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def field_problems(section: str, schema: type, raw: object) -> list[Problem]:
    """What is wrong with the keys and values of one section, each by itself; [] when ``schema`` accepts all of it.

    ``schema`` is a pydantic dataclass. JSON is the route in, for there strict mode takes a mapping for a dataclass and
    an integer for a float, and refuses every other conversion. A missing value (``???``) counts as not given.
    """
    if not isinstance(raw, Mapping):
        return [
            Problem(section, raw, "is a section with keys of its own, not a value", f"set {_keys(section, schema)}")
        ]
    given = {key: value for key, value in raw.items() if value != MISSING}
    try:
        TypeAdapter(schema).validate_json(json.dumps(given), strict=True)
    except ValidationError as error:
        found = [dict(details) for details in error.errors(include_url=False)]
        if all(details["loc"] for details in found):
            return [_translate(section, schema, details) for details in found]
        return _unreadable(section, given)
    return []


def _unreadable(section: str, given: Mapping[str, Any]) -> list[Problem]:
    """Keys and values that no JSON can hold: half of a surrogate pair, say, or lists in lists without end."""
    found = []
    for key, value in given.items():
        try:
            TypeAdapter(Any).validate_json(json.dumps({key: value}))
        except ValidationError as error:
            reason = f"can't be read: {error.errors(include_url=False)[0]['msg']}"
            found.append(Problem(f"{section}.{key}", value, reason, "write plain text, numbers, lists of them"))
    return found


def typed(value: object) -> str:
    """A value as it is typed on the command line: ``null``, ``true``, ``[a,b]``, bare text."""
    if isinstance(value, str):
        return value or "''"
    return json.dumps(value, default=str)


def nearest(word: str, options: Iterable[str]) -> str | None:
    """The option that ``word`` was most likely meant to be, or None when none is like it."""
    found = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
    return found[0] if found else None


def unknown_option(group: str, option: object, known: Sequence[str]) -> Problem:
    """``option`` is not among the options of a group, ``known``."""
    near = difflib.get_close_matches(str(option), known, n=3, cutoff=0.5)
    suffix = f"nearest is {group}={near[0]}" if near else ""
    words = [f"choose {' | '.join(known)}", suffix]
    if group == "router":
        words = [f"{suffix} (or {', '.join(near[1:])})" if near[1:] else suffix, "moetrain routers lists them all"]
    note = _NO_ROUTER.get(re.sub("[^a-z]", "", str(option).lower())) if group == "router" else None
    fix = note or "; ".join(filter(None, words))
    return Problem(group, option, f"there is no such option of group {group!r}", fix)


def report(problems: Iterable[Problem]) -> str:
    """All problems, to be printed once."""
    listed = list(problems)
    count = "1 problem" if len(listed) == 1 else f"{len(listed)} problems"
    entries = [f"  {p.field} = {typed(p.value)}\n      why: {p.reason}\n      fix: {p.fix}\n" for p in listed]
    at_start = all(p.field.startswith("preflight.") for p in listed)
    where = "found before the first step" if at_start else "in the configuration"
    return "\n".join([f"moetrain: {count} {where}\n", *entries])


def _translate(section: str, schema: type, details: dict[str, Any]) -> Problem:
    """One pydantic error of a section, in the user's words."""
    key, value = str(details["loc"][0]), details["input"]
    field = ".".join([section, *map(str, details["loc"])])
    kind, context = details["type"], details.get("ctx", {})
    if kind == "unexpected_keyword_argument":
        return _unknown_key(section, schema, key, value)
    if kind == "missing":
        return Problem(field, None, "needs a value", _instance(schema, key, field))
    if kind == "literal_error":
        return _no_option(field, value, _options(schema, key))
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return Problem(field, value, f"must be {words} {typed(context[name])}", _instance(schema, key, field))
    if kind == "string_pattern_mismatch":
        return Problem(
            field, value, "must be a plain name", "use letters, digits, '.', '_' and '-', at most 128 of them"
        )
    if len(details["loc"]) > 1:
        return Problem(field, value, details["msg"][:1].lower() + details["msg"][1:], "correct that entry")
    return _wrong_type(schema, key, field, value, details["msg"])


def _unknown_key(section: str, schema: type, key: str, value: object) -> Problem:
    near = nearest(key, _names(schema))
    known = f"the keys are {_keys(section, schema)}" if _names(schema) else f"leave it out, {section} takes no keys"
    fix = f"write {section}.{near}={typed(value)}" if near else known
    return Problem(f"{section}.{key}", value, f"{section} has no key {key!r}", fix)


def _no_option(field: str, value: object, options: list[str]) -> Problem:
    near = nearest(value, options) if isinstance(value, str) else None
    suffix = f"; nearest is {near}" if near else ""
    return Problem(field, value, "is none of the options", f"choose {' | '.join(options)}{suffix}")


def _wrong_type(schema: type, key: str, field: str, value: object, message: str) -> Problem:
    kinds = [t for t in _types(schema, key) if t in _EXPECTED]
    if not kinds:
        return Problem(field, value, message[:1].lower() + message[1:], f"set {field} to a value of its type")
    reason = f"must be {' or '.join(_EXPECTED[t][0] for t in kinds)}"
    if type(None) in _types(schema, key):
        reason += ", or null"
    if str in kinds and value is not None and not isinstance(value, (dict, list)):
        return Problem(field, value, reason, f"quote it for Hydra too: {field}='\"{typed(value)}\"'")
    if kinds == [bool] and not isinstance(value, bool) and value in (0, 1):
        return Problem(field, value, reason, f"write {field}={typed(value == 1)}")
    if kinds == [int] and isinstance(value, float) and value.is_integer():
        return Problem(field, value, f"{reason}, written as one", f"write {field}={int(value)}")
    return Problem(field, value, reason, _instance(schema, key, field))


def _field(schema: type, key: str) -> Any:
    return schema.__pydantic_fields__[key]  # type: ignore[attr-defined]


def _names(schema: type) -> list[str]:
    return list(schema.__pydantic_fields__)  # type: ignore[attr-defined]


def _keys(section: str, schema: type) -> str:
    return ", ".join(f"{section}.{name}" for name in _names(schema))


def _types(schema: type, key: str) -> list[Any]:
    """The plain types that a key takes: ``int | None`` gives int and NoneType, ``list[str]`` gives list."""
    annotation = _field(schema, key).annotation
    members = get_args(annotation)
    if not members or getattr(annotation, "__origin__", None) is list:
        members = (annotation,)
    return [getattr(member, "__origin__", member) for member in members]


def _options(schema: type, key: str) -> list[str]:
    """The values of a key that is a ``Literal`` (or a ``Literal`` or null), as typed."""
    found: list[str] = []
    for member in [_field(schema, key).annotation, *get_args(_field(schema, key).annotation)]:
        found += [typed(v) for v in getattr(member, "__args__", ()) if not isinstance(v, type)]
    return [*dict.fromkeys(found), *(["null"] if type(None) in _types(schema, key) else [])]


def _instance(schema: type, key: str, field: str) -> str:
    """Advice with a value that the key accepts: its default where there is one, else one of its type."""
    default = _field(schema, key).default
    if isinstance(default, (bool, int, float, str)):
        return f"set {field}={typed(default)}, for example"
    value = next((_EXPECTED[t][1] for t in _types(schema, key) if t in _EXPECTED), "...")
    return f"set {field}={value}, for example"
