"""Hot experts of a layer, lent to every rank of the EP group: their weights travel, and their tokens stay."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moetrain.moe.dispatch.local import rows_by_expert
from moetrain.moe.experts import Experts
from moetrain.ops.slots import count_experts
from moetrain.parallel.mesh import Mesh
from moetrain.parallel.share import Loan, start_loan
from moetrain.types import Dispatched, Placement


class Shadows:
    """``hot``: global ids, ascending, the same on every rank; they may be changed between steps. None: nothing is done.

    The result is that of the layer without, to rounding: the same products of the same rows, added up in another order.
    """

    def __init__(self, num_experts: int, mesh: Mesh) -> None:
        self._num_experts, self._mesh = num_experts, mesh
        self.put(())

    def put(self, hot: tuple[int, ...]) -> None:
        """From the next forward on."""
        self.hot = hot
        place_E = torch.full((self._num_experts,), len(hot), dtype=torch.int64)
        place_E[list(hot)] = torch.arange(len(hot))
        self._place_E = place_E.to(self._mesh.device)

    def travels(self, placement: Placement) -> Placement:
        """What is left for the dispatcher."""
        if not self.hot:
            return placement
        is_cold_TK = self._place_E[placement.routing.expert_TK] == len(self.hot)
        return replace(placement, kept_TK=placement.kept_TK & is_cold_TK)

    def stays(self, x_TD: Tensor, placement: Placement) -> Dispatched | None:
        """What is not, as if it had arrived for experts 0 ... len(hot) - 1; None where nothing is hot.

        One host read, of how much that is: with the dispatcher's own a layer with shadows has two. Let it come after
        the dispatcher's counts have set out.
        """
        if not self.hot:
            return None
        routing, num_hot = placement.routing, len(self.hot)
        place_TK = self._place_E[routing.expert_TK]
        stays_TK = placement.kept_TK & (place_TK < num_hot)
        counts_s = count_experts(place_TK, num_hot + 1, stays_TK)[:num_hot]
        rows = rows_by_expert(place_TK, stays_TK, num_hot, int(counts_s.sum()))
        ends_s = counts_s.cumsum(0).to(torch.int32)
        return Dispatched(x_TD, rows, routing.weight_TK, ends_s, None, 0, routing.weight_on)

    def lend(self, experts: Experts) -> Loan | None:
        """Start to lend the weights of the hot experts; None where nothing is hot. Collective."""
        if not self.hot:
            return None
        return start_loan(experts.stacks(), self.hot, experts.first_expert, self._mesh.ep_group)
