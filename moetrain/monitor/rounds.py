"""The doctor's rounds: the same diagnoses while a run trains, each said once, and over a whole run afterwards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields

from pydantic import TypeAdapter, ValidationError

from moetrain.checks import ep_size_of
from moetrain.config import Config
from moetrain.monitor.doctor import MEMORY, NAMES, RULES, Diagnosis, diagnose
from moetrain.monitor.history import History
from moetrain.monitor.jsonl import STEP
from moetrain.monitor.signs import WINDOW, Facts, Signs, facts_of, signs_of, signs_of_series
from moetrain.types import ConfigError, Problem

GONE_AFTER = 5
Key = tuple[str, int | None]


@dataclass(frozen=True)
class News:
    """A diagnosis that has appeared, or has gone: it was not made for GONE_AFTER windows."""

    diagnosis: Diagnosis
    gone: bool

    def __str__(self) -> str:
        return f"{self.diagnosis.title} is over" if self.gone else str(self.diagnosis)

    def data(self) -> dict[str, object]:
        """For an event."""
        return {**vars(self.diagnosis), "state": "gone" if self.gone else "appeared"}


@dataclass(frozen=True)
class Finding:
    """A diagnosis over a whole run, as it was last made. first_step, last_step: when it was made first and last.

    windows: how often. at_end: whether it was made after the last window.
    """

    diagnosis: Diagnosis
    first_step: int
    last_step: int
    windows: int
    at_end: bool


class Rounds:
    """Looks at each log window of a run that is going on; remembers the last windows and what it has said."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._rows: list[dict[str, float]] = []
        self._absent: dict[Key, int] = {}
        self._latest: dict[Key, Diagnosis] = {}

    def visit(self, step: int, numbers: Mapping[str, float]) -> list[News]:
        """After the window that ends with ``step`` -> what has changed."""
        if WINDOW not in numbers:
            return []
        self._rows.append({**numbers, STEP: float(step)})
        windows, steps = MEMORY
        reached = sum(row[STEP] > step - steps for row in self._rows)
        self._rows = self._rows[-max(windows, reached) :]
        found = {(one.name, one.layer): one for one in diagnose(signs_of(self._rows, NAMES, self._facts))}
        news = [News(one, gone=False) for key, one in found.items() if key not in self._latest]
        self._latest |= found
        self._absent = {key: 0 if key in found else self._absent[key] + 1 for key in self._latest}
        for key in [key for key, absent in self._absent.items() if absent == GONE_AFTER]:
            news.append(News(self._latest.pop(key), gone=True))
            del self._absent[key]
        return news


def spoken(news: list[News]) -> list[str]:
    """One line for each name that has appeared, however many layers have it, and one for each that has gone."""
    lines = []
    for name, gone in dict.fromkeys((one.diagnosis.name, one.gone) for one in news):
        same = [one.diagnosis for one in news if (one.diagnosis.name, one.gone) == (name, gone)]
        layers = ", ".join(str(one.layer) for one in same if one.layer is not None)
        where = f" in layer{'s' * (len(same) > 1)} {layers}" if layers else ""
        first = same[0]
        lines.append(f"{name}{where} is over" if gone else f"{name}{where}: {first.evidence}. Remedy: {first.remedy}")
    return lines


def examine(history: History) -> list[Finding]:
    """Everything that is or was wrong with a run, in order of appearance. Raises ConfigError."""
    return findings(_signs(history))


def findings(signs: Signs) -> list[Finding]:
    """Over all windows."""
    made: dict[Key, list[tuple[int, Diagnosis]]] = {}
    for stop in range(1, len(signs.steps_N) + 1):
        for one in diagnose(signs, stop):
            made.setdefault((one.name, one.layer), []).append((int(signs.steps_N[stop - 1]), one))
    end = int(signs.steps_N[-1]) if len(signs.steps_N) else 0
    return [Finding(all_[-1][1], all_[0][0], all_[-1][0], len(all_), all_[-1][0] == end) for all_ in made.values()]


def num_heard(history: History) -> int:
    """How many of the ten rules have seen enough of the run to say anything, be it that nothing is wrong."""
    signs = _signs(history)
    return sum(rule.could_speak(signs) for rule in RULES)


def findings_text(history: History, found: list[Finding], heard: int) -> str:
    """For people. heard: see ``num_heard``."""
    head = f"{history.facts.id}: step {history.last_step} of {history.facts.steps}"
    if not found:
        return f"{head}\n{_nothing_found(heard)}"
    lines = [head]
    for one in found:
        until = "to the end" if one.at_end else f"to {one.last_step}"
        lines.append(f"{one.diagnosis.title}, steps {one.first_step} {until}")
        lines += [f"  evidence: {one.diagnosis.evidence}", f"  remedy: {one.diagnosis.remedy}"]
    return "\n".join(lines)


def _nothing_found(heard: int) -> str:
    if heard == 0:
        return "no verdict: nothing is said of the first steps of a run, nor by a few windows, nor without experts"
    if heard < len(RULES):
        return f"healthy so far: nothing is wrong by {heard} of {len(RULES)} rules, the others need more windows"
    return "healthy: nothing is wrong"


def findings_json(history: History, found: list[Finding], heard: int) -> str:
    """For programs. healthy: null without a verdict."""
    diagnoses = [vars(one.diagnosis) | {k: v for k, v in vars(one).items() if k != "diagnosis"} for one in found]
    healthy = not found if heard else None
    whole = {"run": history.facts.id, "last_step": history.last_step, "healthy": healthy}
    return json.dumps({**whole, "rules": len(RULES), "rules_heard": heard, "diagnoses": diagnoses}, indent=2)


def _signs(history: History) -> Signs:
    config = config_of(history)
    facts = facts_of(config, history.facts.ep_size or ep_size_of(config, history.facts.world_size))
    return signs_of_series(history.series, NAMES, facts)


def config_of(history: History) -> Config:
    """The config of the newest start; sections that it does not know yet are as by default. Raises ConfigError."""
    nested: dict[str, dict[str, object]] = {field.name: {} for field in fields(Config)}
    for key, value in history.facts.config.items():
        section, _, name = key.partition(".")
        nested.setdefault(section, {})[name] = value
    try:
        return TypeAdapter(Config).validate_json(json.dumps(nested), strict=True)
    except ValidationError as error:
        reason = f"its config is not one of this version: {error.errors()[0]['msg']} ({error.errors()[0]['loc']})"
        fix = "read it with the version of moetrain that wrote it"
        raise ConfigError([Problem("RUN", str(history.facts.folder), reason, fix)]) from None
