"""What happened since the last log line, over all ranks: added up on the device, reduced in one place, seldom read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moetrain.parallel.collectives import sum_over
from moetrain.parallel.mesh import Mesh
from moetrain.types import LoadCounts, ModelOutput


@dataclass(frozen=True)
class WindowMeans:
    """Means over micro-batches and ranks, in nats (``balance``: 1.0 is even), and global counts, int64 [L, E]."""

    loss: float
    lm: float
    balance: float
    z: float
    load: LoadCounts | None


class Window:
    """Two all-reduces per ``reduce``, whatever the number of layers: one of numbers, one of counts."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._clear()

    def _clear(self) -> None:
        self._sums_4 = torch.zeros(4, dtype=torch.float64, device=self._mesh.device)
        self._num = 0
        self._load: LoadCounts | None = None

    def add(self, output: ModelOutput) -> None:
        """One micro-batch of this rank; nothing is read by the host."""
        terms = (output.loss, output.lm, output.losses.balance, output.losses.z)
        self._sums_4 += torch.stack(terms).to(torch.float64)
        self._num += 1

    def add_load(self, load: LoadCounts) -> None:
        """The expert load of one step of this rank."""
        before = self._load
        if before is not None:
            load = LoadCounts(load.assigned_LE + before.assigned_LE, load.kept_LE + before.kept_LE)
        self._load = load

    def reduce(self) -> WindowMeans:
        """The window over all ranks; starts a new one. Collective."""
        group = self._mesh.world_group
        loss, lm, balance, z = (sum_over(self._sums_4, group) / (self._num * self._mesh.world_size)).tolist()
        load = None
        if self._load is not None:
            counts_2LE = sum_over(torch.stack([self._load.assigned_LE, self._load.kept_LE]), group).cpu()
            load = LoadCounts(counts_2LE[0], counts_2LE[1])
        self._clear()
        return WindowMeans(loss, lm, balance, z, load)
