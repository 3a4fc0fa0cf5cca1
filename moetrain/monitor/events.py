"""events.jsonl: what happened to a run, and what was done about it: alerts, diagnoses, actions of controllers, skipped
steps, resumes.

Unlike numbers, an event is not forgotten when a resume goes back over its step: it did happen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moetrain.monitor.lines import Keys, LineReader, LineWriter

KEYS = Keys("step", "segment")


@dataclass(frozen=True)
class Event:
    """After ``step`` steps. kind: one word, such as alert, control, skipped, resume. message: for people.

    data: plain values behind the message. undone: a later segment of the run took it up before this step.
    """

    step: int
    kind: str
    message: str
    data: Mapping[str, Any]
    segment: int
    undone: bool


class EventsFile:
    """The writer, for one rank only."""

    def __init__(self, path: Path, step: int) -> None:
        """Open a new segment which continues after ``step`` (0 for a new run). A torn last line is cut off."""
        self.lines = LineWriter(path, KEYS, step, {})

    def write(self, step: int, kind: str, message: str, data: Mapping[str, object]) -> None:
        """data: plain and finite."""
        self.lines.write(step, {"kind": kind, "message": message, "data": dict(data)})

    def close(self) -> None:
        self.lines.close()


def read_events(path: Path) -> tuple[Event, ...]:
    """All events in the order in which they were written, without a torn last line.

    Raises ValueError, naming file and line, if any other line is damaged.
    """
    reader = LineReader(path, KEYS)
    events: list[Event] = []
    for line in reader.poll():
        if line.opens:
            events = [replace(one, undone=True) if one.step > line.step else one for one in events]
            continue
        kind, message, data = line.row.get("kind"), line.row.get("message"), line.row.get("data", {})
        if not isinstance(kind, str) or not isinstance(message, str) or not isinstance(data, dict):
            raise reader.error(line.number, "an event has a kind, a message and data")
        events.append(Event(line.step, kind, message, data, line.segment, undone=False))
    return tuple(events)
