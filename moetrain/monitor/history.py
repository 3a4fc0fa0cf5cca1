"""A run folder read back: complete, still growing, or cut off in the middle of a line.

What a later segment of the run went back over does not count; see moetrain.monitor.lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrain.monitor.events import Event, read_events
from moetrain.monitor.expert_load import ExpertLoadReader, LoadWindow
from moetrain.monitor.jsonl import STEP, read_metrics
from moetrain.monitor.runfolder import RunFolder, read_record
from moetrain.types import ConfigError, Problem


@dataclass(frozen=True)
class Series:
    """One metric: its value after each of ``steps_N``, int64 and ascending; values_N float64, as logged."""

    name: str
    steps_N: NDArray[np.int64]
    values_N: NDArray[np.float64]


@dataclass(frozen=True)
class RunFacts:
    """What run.json says, of the newest start. Configuration: dotted keys and plain values.

    router: the router's class and its settings, in one line. ep_size: None where it was left to moetrain and no load
    window says it either. top_k: None for a router that has no such setting. steps: that the run is to do altogether.
    starts: how often the process was started; started: when it first was, ISO 8601.
    """

    id: str
    folder: Path
    recipe: str
    router: str
    world_size: int
    ep_size: int | None
    num_experts: int
    top_k: int | None
    steps: int
    starts: int
    started: str
    commit: str | None
    config: Mapping[str, Any]


@dataclass(frozen=True)
class History:
    """Everything that a run has written. ``last_step``: the last that was logged, 0 if none was."""

    facts: RunFacts
    series: Mapping[str, Series]
    loads: tuple[LoadWindow, ...]
    events: tuple[Event, ...]
    last_step: int

    @property
    def is_over(self) -> bool:
        """Whether the run has logged its last step."""
        return self.last_step >= self.facts.steps


def read_history(path: Path) -> History:
    """Read a run folder. A torn last line of any file is left out.

    Raises ConfigError if the folder holds no run, or naming file and line if anything else in it is damaged.
    """
    folder = RunFolder(path)
    record = run_record(folder)
    try:
        rows = read_metrics(folder.metrics)
        reader = ExpertLoadReader(folder.expert_load)
        reader.poll()
        loads, events = reader.windows(), read_events(folder.events)
    except ValueError as error:
        raise damaged(path, error) from None
    last_step = int(rows[-1][STEP]) if rows else 0
    return History(_facts(folder, record, loads), _series(rows), loads, events, last_step)


def run_record(folder: RunFolder) -> dict[str, Any]:
    """The run.json of a folder. Raises ConfigError if there is none or if it is damaged."""
    where = "give the folder of a run, e.g. outputs/first-try"
    if not folder.record.is_file():
        raise ConfigError([Problem("RUN", str(folder.path), "holds no run.json, so it is no run folder", where)])
    record = read_record(folder.record)
    if record is None or not record["starts"]:
        reason = f"{folder.record} is damaged: it is no JSON object with a config and starts"
        raise ConfigError([Problem("RUN", str(folder.path), reason, where)])
    return record


def damaged(path: Path, error: ValueError) -> ConfigError:
    """For a file of the run that can not be read; ``error`` names file and line."""
    fix = "mend or delete that line; the other files of the run do not depend on it"
    return ConfigError([Problem("RUN", str(path), str(error), fix)])


def _series(rows: list[dict[str, float]]) -> dict[str, Series]:
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        step = int(row[STEP])
        for name, value in row.items():
            steps, values = found.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
    return {
        name: Series(name, np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64))
        for name, (steps, values) in sorted(found.items())
    }


def _facts(folder: RunFolder, record: Mapping[str, Any], loads: tuple[LoadWindow, ...]) -> RunFacts:
    config, starts = record["config"], record["starts"]
    try:
        return RunFacts(
            id=folder.path.resolve().name,
            folder=folder.path,
            recipe=config["recipe.name"],
            router=_router(config),
            world_size=starts[-1]["world_size"],
            ep_size=loads[-1].ep_size if loads else config["engine.ep_size"],
            num_experts=config["experts.num_experts"],
            top_k=config.get("router.top_k"),
            steps=config["train.steps"],
            starts=len(starts),
            started=starts[0]["time"],
            commit=starts[-1]["commit"],
            config=config,
        )
    except KeyError as error:
        fix = "read it with the version of moetrain that wrote it"
        raise ConfigError([Problem("RUN", str(folder.path), f"{folder.record} has no {error}", fix)]) from None


def _router(config: Mapping[str, Any]) -> str:
    """Such as ``TokenChoiceRouter(top_k=2, score=softmax)``."""
    given = {key.removeprefix("router."): value for key, value in config.items() if key.startswith("router.")}
    name = str(given.pop("_target_")).rsplit(".", 1)[-1]
    return f"{name}({', '.join(f'{key}={value}' for key, value in given.items())})"
