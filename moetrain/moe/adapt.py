"""Routers that learn outside of the gradient: statistics added up once, one exchange a step for all layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moetrain.moe.load import ExpertLoad
from moetrain.moe.routers.base import Router, StepSeen
from moetrain.parallel.collectives import sum_over
from moetrain.parallel.mesh import Mesh


class Observed:
    """Sums of one router's statistics over the micro-batches of a step, fp64 [S]."""

    def __init__(self) -> None:
        self._sum_S: Tensor | None = None
        self.num = 0

    def commit(self, router: Router) -> None:
        """Add the latest micro-batch, once."""
        statistics_S = router.statistics()
        self._sum_S = statistics_S if self._sum_S is None else self._sum_S + statistics_S
        self.num += 1

    def take(self) -> Tensor:
        """The sums since the last take; starts anew."""
        assert self._sum_S is not None, "take() before any commit()"
        taken_S, self._sum_S, self.num = self._sum_S, None, 0
        return taken_S


def adapt(
    routers: Sequence[Router], loads: Sequence[ExpertLoad], observed: Sequence[Observed], mesh: Mesh, moved: bool
) -> None:
    """After an optimiser step, before the load is taken: let every router adjust, all by the same global sums.

    One all-reduce of counts and, if any router has statistics, one more. ``moved``: whether the weights were updated;
    a step that was skipped (gradients not finite) moves no buffer either. Collective.
    """
    if not any(router.adapts for router in routers):
        return
    assert all(router.adapts for router in routers), "one router section, so all layers are alike"
    num = observed[0].num * mesh.world_size
    statistics_LS = torch.stack([seen.take() for seen in observed])
    if not moved:
        return
    counts_LE = sum_over(torch.stack([load.pending_2E[0] for load in loads]), mesh.world_group)
    if statistics_LS.numel():
        statistics_LS = sum_over(statistics_LS, mesh.world_group)
    for layer, router in enumerate(routers):
        router.adjust(StepSeen(layer, counts_LE, statistics_LS, num))
