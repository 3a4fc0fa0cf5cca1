"""metrics.jsonl: the truth about a run, one JSON object a line, only ever appended to.

Every line holds ``train/step``, ``train/tokens`` and ``run/segment``. A segment is one life of the process: a new run
is segment 1, every resume opens the next one. The first line of a segment carries no metrics and says, in
``train/step``, where the segment took up the run; what earlier segments had logged beyond that step stays in the file
but no longer counts.

JSON has no word for what is not finite: such values are written as the strings "NaN", "Infinity" and "-Infinity", and
``read_metrics`` turns them back into floats.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

STEP, TOKENS, SEGMENT = "train/step", "train/tokens", "run/segment"
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsFile:
    """The writer, for one rank only. Every line is flushed, so a killed run keeps what it had logged."""

    def __init__(self, path: Path, step: int, tokens: int) -> None:
        """Open a new segment which continues after ``step`` (0 for a new run). A torn last line is cut off."""
        lines = _whole_lines(path)
        self._segment = _last_segment(lines) + 1
        self._file = path.open("r+" if path.exists() else "w", encoding="utf-8", newline="\n")
        self._file.truncate(len(lines))
        self._file.seek(0, 2)
        self.write(step, tokens, {})

    def write(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """One line: after ``step`` optimiser steps and ``tokens`` training tokens, of the whole job since its start."""
        row: dict[str, object] = {STEP: step, TOKENS: tokens, SEGMENT: self._segment}
        assert not row.keys() & metrics.keys(), f"reserved names in {sorted(metrics)}"
        row.update({name: _to_json(value) for name, value in metrics.items()})
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """One dict a step, in order of steps: lines of the same step are merged, the last value of a name wins.

    Lines that a later segment went back over are left out, and so is a torn last line.
    Raises ValueError, naming the line, if any other line is not a JSON object.
    """
    by_step: dict[int, dict[str, float]] = {}
    segment = 0
    for row in _parse(path, _whole_lines(path)):
        step = int(row[STEP])
        if row[SEGMENT] != segment:
            segment = int(row[SEGMENT])
            by_step = {s: kept for s, kept in by_step.items() if s <= step}
        elif row.keys() - {STEP, TOKENS, SEGMENT}:
            by_step.setdefault(step, {}).update(row)
    return [by_step[step] for step in sorted(by_step)]


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def _last_segment(lines: bytes) -> int:
    """The number of the newest segment, 0 if there is none; a damaged line is no reason not to train on."""
    numbers = [0]
    for line in lines.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            numbers.append(int(json.loads(line)[SEGMENT]))
    return max(numbers)


def _parse(path: Path, lines: bytes) -> list[dict[str, float]]:
    rows = []
    for number, line in enumerate(lines.splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.append({name: _from_json(value) for name, value in row.items()})
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not a JSON object: {line[:80]!r}") from error
    return rows


def _to_json(value: float) -> object:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def _from_json(value: object) -> float:
    if isinstance(value, str):
        return NOT_FINITE[value]
    assert isinstance(value, int | float), value
    return value
