"""All experts on this rank: sort by expert, and back. The reference of the other dispatchers."""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.moe.dispatch.base import Departure, Dispatcher, Trip
from moetrain.ops.slots import count_experts
from moetrain.types import Dispatched, Placement, Routing, RowMap


def rows_by_expert(expert_TK: Tensor, kept_TK: Tensor, num_experts: int, num_kept: int) -> RowMap:
    """Kept assignments in order of their expert, then of their token; dropped ones have no row."""
    expert_N = expert_TK.masked_fill(~kept_TK, num_experts).reshape(-1)
    order_N = torch.argsort(expert_N, stable=True)
    row_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(order_N.numel(), device=order_N.device))
    row_TK = row_N.clamp(max=num_kept).view_as(kept_TK)
    return RowMap(order_N[:num_kept], row_TK, has_empty=False)


class LocalDispatcher(Dispatcher):
    """No communication; one host read of how many were kept."""

    def depart(self, x_TD: Tensor, placement: Placement) -> Departure:
        counts_E = count_experts(placement.routing.expert_TK, self.num_experts, placement.kept_TK)
        yield
        rows = rows_by_expert(placement.routing.expert_TK, placement.kept_TK, self.num_experts, int(counts_E.sum()))
        return [self._trip(x_TD, placement.routing, rows, counts_E)]

    def _trip(self, x_TD: Tensor, routing: Routing, rows: RowMap, counts_E: Tensor) -> Trip:
        yield None
        ends_e = counts_E.cumsum(0).to(torch.int32)
        out_TD = yield Dispatched(x_TD, rows, routing.weight_TK, ends_e, None, 0, routing.weight_on)
        assert out_TD is not None
        yield None
        return out_TD
