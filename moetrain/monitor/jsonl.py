"""metrics.jsonl: the truth about a run, one JSON object a line, only ever appended to.

Every line holds ``train/step``, ``train/tokens`` and ``run/segment`` (see moetrain.monitor.lines).

JSON has no word for what is not finite: such values are written as the strings "NaN", "Infinity" and "-Infinity", and
``read_metrics`` turns them back into floats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from moetrain.monitor.lines import Keys, Line, LineReader, LineWriter

STEP, TOKENS, SEGMENT = "train/step", "train/tokens", "run/segment"
KEYS = Keys(STEP, SEGMENT)
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsFile:
    """The writer, for one rank only. Every line is flushed, so a killed run keeps what it had logged."""

    def __init__(self, path: Path, step: int, tokens: int) -> None:
        """Open a new segment which continues after ``step`` (0 for a new run). A torn last line is cut off."""
        self.lines = LineWriter(path, KEYS, step, {TOKENS: tokens})

    def write(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """One line: after ``step`` optimiser steps and ``tokens`` training tokens, of the whole job since its start."""
        assert TOKENS not in metrics, f"reserved names in {sorted(metrics)}"
        self.lines.write(step, {TOKENS: tokens, **{name: _to_json(value) for name, value in metrics.items()}})

    def close(self) -> None:
        self.lines.close()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class MetricsReader:
    """The reader, of a run that may still be going on."""

    def __init__(self, path: Path) -> None:
        self._lines = LineReader(path, KEYS)
        self._by_step: dict[int, dict[str, float]] = {}

    def poll(self) -> bool:
        """Read what is new. Returns whether there was anything. Raises ValueError, naming file and line."""
        lines = self._lines.poll()
        for line in lines:
            values = self._values(line)
            if line.opens:
                self._by_step = {step: kept for step, kept in self._by_step.items() if step <= line.step}
            elif values.keys() - {STEP, TOKENS, SEGMENT}:
                self._by_step.setdefault(line.step, {}).update(values)
        return bool(lines)

    def rows(self) -> list[dict[str, float]]:
        """One dict a step, in order of steps: lines of the same step are merged, the last value of a name wins."""
        return [self._by_step[step] for step in sorted(self._by_step)]

    def _values(self, line: Line) -> dict[str, float]:
        out = {}
        for name, value in line.row.items():
            number = NOT_FINITE.get(value, value) if isinstance(value, str) else value
            if not isinstance(number, int | float):
                raise self._lines.error(line.number, f"{name} is no number: {value!r:.80}")
            out[name] = number
        return out


def read_metrics(path: Path) -> list[dict[str, float]]:
    """One dict a step, in order of steps: lines of the same step are merged, the last value of a name wins.

    Lines that a later segment went back over are left out, and so is a torn last line.
    Raises ValueError, naming the line, if any other line is not a JSON object.
    """
    reader = MetricsReader(path)
    reader.poll()
    return reader.rows()


def _to_json(value: float) -> object:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
