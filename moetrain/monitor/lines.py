"""Append-only files of one JSON object a line, which survive being killed and being resumed.

Every line says at which step it was written and to which segment of the run it belongs. A segment is one life of the
process: a new run is segment 1, every resume opens the next one. The first line of a segment says where it took up the
run; what earlier segments had written beyond that step stays in the file but no longer counts.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any


@dataclass(frozen=True)
class Keys:
    """The names under which a line holds its step and its segment."""

    step: str
    segment: str


@dataclass(frozen=True)
class Line:
    """One whole line. ``opens``: it is the first of its segment and holds nothing but where the segment took up."""

    number: int
    step: int
    segment: int
    opens: bool
    row: dict[str, Any]


class LineWriter:
    """For one rank only. Every line is on its way to the disk at once, so a killed run keeps what it had written.

    A line that can not be written (the disk is full) is counted in ``lost`` and leaves no trace: ``failure`` says why
    the last one was, and the next one is tried anew.
    """

    def __init__(self, path: Path, keys: Keys, step: int, opening: Mapping[str, object]) -> None:
        """Open a new segment which continues after ``step`` (0 for a new run). A torn last line is cut off.

        opening: what else the first line of the segment says. Raises OSError if the file can not be opened.
        """
        self.path, self.lost, self.failure = path, 0, ""
        self._keys = keys
        lines = _whole_lines(path)
        self._segment = _last_segment(lines, keys) + 1
        self._file = path.open("r+b" if path.exists() else "w+b", buffering=0)
        self._end = len(lines)
        self._file.truncate(self._end)
        first = self._line(step, opening)
        self._opening = b"" if self._append(first) else first

    def write(self, step: int, values: Mapping[str, object]) -> None:
        """One line, written after ``step`` optimiser steps; ``values`` are plain and finite.

        It is written after the first line of the segment only, by which a reader knows where that begins.
        """
        line = self._line(step, values)
        if self._append(self._opening + line):
            self._opening = b""
        else:
            self.lost += 1

    def _line(self, step: int, values: Mapping[str, object]) -> bytes:
        row: dict[str, object] = {self._keys.step: step, self._keys.segment: self._segment}
        assert not row.keys() & values.keys(), f"reserved names in {sorted(values)}"
        return (json.dumps({**row, **values}, allow_nan=False) + "\n").encode()

    def _append(self, content: bytes) -> bool:
        """All of it, or nothing that a later line would not overwrite."""
        try:
            self._file.seek(self._end)
            left = memoryview(content)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self.failure = error.strerror or str(error)
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            return False
        self._end += len(content)
        return True

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()

    def __enter__(self) -> LineWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LineReader:
    """Reads a file that may still be growing: each ``poll`` takes up where the last one ended."""

    def __init__(self, path: Path, keys: Keys) -> None:
        self.path = path
        self._keys = keys
        self._offset, self._number, self._segment = 0, 0, 0

    def poll(self) -> list[Line]:
        """The whole lines that are new since the last call; a torn last one waits. No file means no lines.

        Raises ValueError, naming file and line, if a line is not an object with a step and a segment.
        """
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._offset)
            content = file.read()
        content = content[: content.rfind(b"\n") + 1]
        self._offset += len(content)
        return [self._line(text) for text in content.split(b"\n")[:-1]]

    def error(self, number: int, what: str) -> ValueError:
        """To be raised for what is wrong with line ``number``."""
        return ValueError(f"{self.path}, line {number}: {what}")

    def _line(self, text: bytes) -> Line:
        self._number += 1
        row: object = None
        with contextlib.suppress(ValueError):
            row = json.loads(text)
        if not isinstance(row, dict):
            raise self.error(self._number, f"not a JSON object: {text[:80]!r}")
        step, segment = row.get(self._keys.step), row.get(self._keys.segment)
        if not isinstance(step, int) or not isinstance(segment, int):
            raise self.error(self._number, f"no whole numbers {self._keys.step} and {self._keys.segment}")
        opens, self._segment = segment != self._segment, segment
        return Line(self._number, step, segment, opens, row)


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def _last_segment(lines: bytes, keys: Keys) -> int:
    """The number of the newest segment, 0 if there is none; a damaged line is no reason not to train on."""
    numbers = [0]
    for line in lines.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            numbers.append(int(json.loads(line)[keys.segment]))
    return max(numbers)
