"""What happened since the last log line, over all ranks: added up on the device, reduced in one place, seldom read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

from moetrain.parallel.collectives import sum_over
from moetrain.parallel.mesh import Mesh
from moetrain.types import LoadCounts, LossTerms, ModelOutput

NAMES = tuple(field.name for field in fields(LossTerms))


@dataclass(frozen=True)
class WindowMeans:
    """Means over micro-batches and ranks, in nats, router losses by the names of ``LossTerms``, and global counts,
    int64 [L, E].
    """

    loss: float
    lm: float
    terms: Mapping[str, float]
    load: LoadCounts | None


class Window:
    """Two all-reduces per ``reduce``, whatever the number of layers: one of numbers, one of counts."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._clear()

    def _clear(self) -> None:
        self._sums_X = torch.zeros(2 + len(NAMES), dtype=torch.float64, device=self._mesh.device)
        self._num = 0
        self._load: LoadCounts | None = None

    def add(self, output: ModelOutput) -> None:
        """One micro-batch of this rank; nothing is read by the host."""
        numbers = [output.loss, output.lm, *(getattr(output.losses, name) for name in NAMES)]
        self._sums_X += torch.stack(numbers).to(torch.float64)
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
        loss, lm, *terms = (sum_over(self._sums_X, group) / (self._num * self._mesh.world_size)).tolist()
        load = None
        if self._load is not None:
            counts_2LE = sum_over(torch.stack([self._load.assigned_LE, self._load.kept_LE]), group).cpu()
            load = LoadCounts(counts_2LE[0], counts_2LE[1])
        self._clear()
        return WindowMeans(loss, lm, dict(zip(NAMES, terms, strict=True)), load)
