"""How much the load moves from step to step within a window: the sum over a window can be even while no step is.

With r_te the load of expert e in step t over its fair share (1 is fair), the swing of a layer is the root of
``mean_e var_t(r_te)``, less the variance that N independent assignments have by chance, ``(E - 1) / N``. An expert that
gets twice its share in one step and nothing in the next has a swing of 1. Each rank looks at its own tokens, since a
step's load over all ranks would cost a collective a step; ranks are averaged.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Swing:
    """Sums over the steps of a window, on the device of the counts; nothing is read by the host."""

    def __init__(self) -> None:
        self._steps = 0
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, assigned_LE: Tensor) -> None:
        """One step of this rank, int64 counts before dropping."""
        counts_LE, num_experts = assigned_LE.double(), assigned_LE.shape[1]
        total_L = counts_LE.sum(1).clamp_min(1.0)
        relative_LE = counts_LE * num_experts / total_L.unsqueeze(1)
        step = (relative_LE, relative_LE.square().mean(1), (num_experts - 1) / total_L)
        self._steps += 1
        earlier = self._sums
        self._sums = step if earlier is None else (earlier[0] + step[0], earlier[1] + step[1], earlier[2] + step[2])

    def of_rank(self) -> Tensor:
        """The squared swing of each layer, fp64 [L]; 0 for a single step, and where chance explains it all."""
        assert self._sums is not None
        mean_LE, square_L, chance_L = (total / self._steps for total in self._sums)
        if self._steps == 1:
            return torch.zeros_like(square_L)
        variance_L = (square_L - mean_LE.square().mean(1)) * self._steps / (self._steps - 1)
        return (variance_L - chance_L).clamp_min(0.0)
