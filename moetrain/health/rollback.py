"""Going back past bad data: which batch a step takes, after the run has gone back to a checkpoint once or more.

A run that is taken back to step s after it had taken the batches up to n goes on with batch n at step s: every batch
between, seen before and during the bad steps, is left out (Chowdhery et al., "PaLM", 2022, section 5.1).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class Unstable(RuntimeError):
    """The run can not go on by itself. Its message is the report."""


@dataclass(frozen=True)
class Jump:
    """From step ``step`` on, batches lie ``batches`` further on than the step says."""

    step: int
    batches: int


class Rollbacks:
    """The jumps of a run, in ``path``, which rank 0 writes. The same on every rank."""

    def __init__(self, path: Path, is_main: bool, share: Callable[[str], str]) -> None:
        """share: gives rank 0's text to every rank. Raises ValueError, on every rank, if the file is damaged."""
        self._path, self._is_main = path, is_main
        text = share(path.read_text() if is_main and path.exists() else "[]")
        try:
            self._jumps = [Jump(int(one["step"]), int(one["batches"])) for one in json.loads(text)]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged: {error!r}") from error

    @property
    def num_done(self) -> int:
        return len(self._jumps)

    def batch_of(self, step: int) -> int:
        """The batch that step ``step`` (from 0) takes: of the jumps at or before it, the last counts."""
        return step + next((jump.batches for jump in reversed(self._jumps) if jump.step <= step), 0)

    def jump(self, to_step: int, from_step: int) -> None:
        """The run goes back to ``to_step``, with the batch that ``from_step`` would have taken."""
        batches = self.batch_of(from_step) - to_step
        self._jumps.append(Jump(to_step, batches))
        if self._is_main:
            fresh = self._path.with_name(self._path.name + ".new")
            fresh.write_text(json.dumps([{"step": one.step, "batches": one.batches} for one in self._jumps]) + "\n")
            fresh.replace(self._path)
