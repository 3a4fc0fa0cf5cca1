"""Going back past bad data: to which checkpoint, and which batch a step takes after that.

A run that is taken back to step s after it had taken the batches up to n goes on with batch n at step s: every batch
between, seen before and during the bad steps, is left out (Chowdhery et al., "PaLM", 2022, section 5.1).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from moetrain import checkpoint
from moetrain.checkpoint import NoneWhole, Source
from moetrain.monitor.runfolder import RunFolder
from moetrain.parallel.collectives import broadcast_text
from moetrain.parallel.mesh import Mesh
from moetrain.types import ConfigError, Problem


class Unstable(RuntimeError):
    """The run can not go on by itself. Its message is the report."""


@dataclass(frozen=True)
class Jump:
    """From step ``step`` on, batches lie ``batches`` further on than the step says."""

    step: int
    batches: int


class Rollbacks:
    """The jumps of a run, in its folder, where rank 0 writes them. The same on every rank."""

    def __init__(self, folder: RunFolder, mesh: Mesh, most: int) -> None:
        """most: how often a run goes back. Raises ConfigError, on every rank, if the file is damaged. Collective."""
        self._path, self._checkpoints, self._mesh, self._most = folder.rollbacks, folder.checkpoints, mesh, most
        content = self._path.read_bytes() if mesh.is_main and self._path.exists() else b"[]"
        text = broadcast_text(content.decode(errors="replace"), mesh.world_group)
        try:
            self._jumps = _jumps(text, self._path)
        except ValueError as error:
            fix = "bring that file back, for it says which data to leave out, or name another run.id"
            raise ConfigError([Problem("run.id", folder.id, str(error), fix)]) from error

    def batch_of(self, step: int) -> int:
        """The batch that step ``step`` (from 0) takes: of the jumps at or before it, the last counts."""
        return step + next((jump.batches for jump in reversed(self._jumps) if jump.step <= step), 0)

    def source(self, first_bad: int) -> Source:
        """The newest checkpoint that verifies and was saved before step number ``first_bad``, the first of the bad
        ones: what was saved among them may hold what they suffer from.

        If that is the one that the run went back to last, its weights have met bad steps on other data too: then the
        one before it, if there is any. Raises Unstable if there is nothing to go back to, or it was done too often.
        Collective.
        """
        if len(self._jumps) >= self._most:
            raise Unstable(f"the run has gone back {len(self._jumps)} times already (health.max_rollbacks)")
        try:
            found = checkpoint.find(self._checkpoints, self._mesh, before=first_bad)
            if found is not None and self._jumps and found.step == self._jumps[-1].step:
                found = checkpoint.find(self._checkpoints, self._mesh, before=found.step) or found
        except NoneWhole as error:
            raise Unstable(str(error)) from error
        if found is None:
            raise Unstable("there is no checkpoint from before them to go back to (train.checkpoint_every)")
        return found

    def jump(self, to_step: int, from_step: int) -> None:
        """The run goes back to ``to_step``, with the batch that ``from_step`` would have taken.

        What was saved since is removed first: a run that is killed between the two goes back once more.
        """
        self._jumps.append(Jump(to_step, self.batch_of(from_step) - to_step))
        if self._mesh.is_main:
            checkpoint.remove_later(self._checkpoints, to_step)
            fresh = self._path.with_name(self._path.name + ".new")
            fresh.write_text(json.dumps([{"step": one.step, "batches": one.batches} for one in self._jumps]) + "\n")
            fresh.replace(self._path)


def _jumps(text: str, path: Path) -> list[Jump]:
    try:
        jumps = [Jump(int(one["step"]), int(one["batches"])) for one in json.loads(text)]
        if any(one.step < 0 or one.batches < 0 for one in jumps):
            raise ValueError("steps and batches are counted from 0")
        return jumps
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
