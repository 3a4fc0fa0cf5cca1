"""What happened since the last log line, over all ranks: added up on the device, reduced in one place, seldom read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moetrain.monitor.swing import Swing
from moetrain.parallel.collectives import ProcessGroup, sum_over
from moetrain.parallel.mesh import Mesh
from moetrain.types import Gauges, LoadCounts, LossTerms, ModelOutput

NAMES = tuple(field.name for field in fields(LossTerms))
Counts = NDArray[np.int64]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class GaugeMeans:
    """Gauges of all MoE layers over all ranks; a row a layer.

    choice_2LK, position_2LP: assignments before and after dropping, by rank of the choice and by eighth of the
    sequence. received_LW: rows that each rank's experts were given; travelled_LW: those that other ranks sent to it.
    entropy_L: of the full distribution, 1 is uniform. confidence_L: mean of the largest probability. logit_rms_L,
    logit_max_L: of the router's logits. swing_L: how far an expert's load strays from its mean from step to step, in
    fair shares; see monitor/swing.py.
    """

    choice_2LK: Counts
    position_2LP: Counts
    received_LW: Counts
    travelled_LW: Counts
    entropy_L: Array
    confidence_L: Array
    logit_rms_L: Array
    logit_max_L: Array
    swing_L: Array


@dataclass(frozen=True)
class WindowMeans:
    """Means over micro-batches and ranks, in nats, router losses by the names of ``LossTerms``, and global counts,
    int64 [L, E]. NaN and None where the window holds nothing. num_steps: that are counted, without skipped ones.
    """

    loss: float
    lm: float
    terms: Mapping[str, float]
    load: LoadCounts | None
    gauges: GaugeMeans | None = None
    num_steps: int = 0


class Window:
    """One all-reduce per ``reduce``, whatever the number of layers."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._clear()

    def _clear(self) -> None:
        self._sums_X = torch.zeros(2 + len(NAMES), dtype=torch.float64, device=self._mesh.device)
        self._num = self._num_steps = 0
        self._load: LoadCounts | None = None
        self._gauges: list[Gauges] | None = None
        self._swing = Swing()

    def add(self, output: ModelOutput) -> None:
        """One micro-batch of this rank; nothing is read by the host."""
        numbers = [output.loss, output.lm, *(getattr(output.losses, name) for name in NAMES)]
        self._sums_X += torch.stack(numbers).to(torch.float64)
        self._num += 1

    def add_load(self, load: LoadCounts, gauges: list[Gauges]) -> None:
        """The expert load of one step of this rank, and the gauges of each MoE layer."""
        self._num_steps += 1
        self._swing.add(load.assigned_LE)
        if self._load is None or self._gauges is None:
            self._load, self._gauges = load, gauges
            return
        self._load = self._load.plus(load)
        self._gauges = [old.plus(new) for old, new in zip(self._gauges, gauges, strict=True)]

    def reduce(self) -> WindowMeans:
        """The window over all ranks; starts a new one. Collective."""
        parts, load, gauges = [self._sums_X], self._load, self._gauges
        if load is not None and gauges:
            counted = [load.assigned_LE, load.kept_LE, *([] if load.domain_LDE is None else [load.domain_LDE])]
            parts += [*counted, *_parts(gauges, self._swing.of_rank(), self._mesh)]
        sums_X, *rest = sum_together(parts, self._mesh.world_group)
        means_X = sums_X / (self._num * self._mesh.world_size) if self._num else torch.full_like(sums_X, torch.nan)
        loss, lm, *terms = means_X.tolist()
        counts, means = None, None
        if load is not None and rest:
            num_counts = 2 if load.domain_LDE is None else 3
            counts = LoadCounts(*(sums.to(torch.int64) for sums in rest[:num_counts]))
            means = _means(rest[num_counts:], load.assigned_LE.shape[1], self._mesh.world_size)
        num_steps = self._num_steps
        self._clear()
        return WindowMeans(loss, lm, dict(zip(NAMES, terms, strict=True)), counts, means, num_steps)


def sum_together(tensors: Sequence[Tensor], group: ProcessGroup | None) -> list[Tensor]:
    """Each tensor summed over the group, by one all-reduce; fp64 on the CPU, where integers below 2^53 stay exact."""
    flat_X = torch.cat([tensor.to(torch.float64).flatten() for tensor in tensors])
    sums_X = sum_over(flat_X, group).cpu()
    pieces = sums_X.split([tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]


def _parts(gauges: list[Gauges], swing_L: Tensor, mesh: Mesh) -> list[Tensor]:
    """What is summed; where each rank counts by itself, it has a column of its own."""
    choice_2LK = torch.stack([g.choice_2K for g in gauges], dim=1)
    position_2LP = torch.stack([g.position_2P for g in gauges], dim=1)
    means = [torch.stack([g.tokens, g.entropy, g.confidence, g.logit_square]) for g in gauges]
    own_3LW = torch.zeros(3, len(gauges), mesh.world_size, dtype=torch.float64, device=mesh.device)
    for own_LW, name in zip(own_3LW, ("received", "travelled", "logit_peak"), strict=True):
        own_LW[:, mesh.rank] = torch.stack([getattr(gauge, name) for gauge in gauges]).double()
    return [choice_2LK, position_2LP, torch.stack(means), own_3LW, swing_L]


def _means(sums: list[Tensor], num_experts: int, world_size: int) -> GaugeMeans:
    choice_2LK, position_2LP, sums_L4, own_3LW, swing_L = (tensor.numpy() for tensor in sums)
    received_LW, travelled_LW, peak_LW = own_3LW
    tokens_L, entropy_L, confidence_L, square_L = sums_L4.T
    tokens_L = np.where(tokens_L == 0, np.nan, tokens_L)
    return GaugeMeans(
        choice_2LK=choice_2LK.astype(np.int64),
        position_2LP=position_2LP.astype(np.int64),
        received_LW=received_LW.astype(np.int64),
        travelled_LW=travelled_LW.astype(np.int64),
        entropy_L=entropy_L / tokens_L / max(math.log(num_experts), 1e-12),
        confidence_L=confidence_L / tokens_L,
        logit_rms_L=np.sqrt(square_L / tokens_L),
        logit_max_L=peak_LW.max(axis=1),
        swing_L=np.sqrt(swing_L / world_size),
    )
