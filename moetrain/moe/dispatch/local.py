"""All experts on this rank: sort by expert, and back. The reference of the other dispatchers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.moe.dispatch.base import Dispatcher, output_weights, with_input_weights
from moetrain.ops.permute import RowMap, tokens_of_rows
from moetrain.ops.slots import count_experts
from moetrain.types import Dispatched, Placement


def rows_by_expert(expert_TK: Tensor, kept_TK: Tensor, num_experts: int, num_kept: int) -> RowMap:
    """Kept assignments in order of their expert, then of their token; dropped ones have no row."""
    expert_N = expert_TK.masked_fill(~kept_TK, num_experts).reshape(-1)
    order_N = torch.argsort(expert_N, stable=True)
    row_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(order_N.numel(), device=order_N.device))
    row_TK = row_N.clamp(max=num_kept).view_as(kept_TK)
    return RowMap(order_N[:num_kept], row_TK, has_empty=False)


@dataclass(frozen=True)
class LocalDispatched(Dispatched):
    """weight_TK and the map back."""

    weight_TK: Tensor
    rows: RowMap


class LocalDispatcher(Dispatcher):
    """No communication; one host read of how many were kept."""

    def forward(self, x_TD: Tensor, placement: Placement) -> LocalDispatched:
        counts_E = count_experts(placement.routing.expert_TK, self.num_experts, placement.kept_TK)
        rows = rows_by_expert(placement.routing.expert_TK, placement.kept_TK, self.num_experts, int(counts_E.sum()))
        ends_e = counts_E.cumsum(0).to(torch.int32)
        return LocalDispatched(
            with_input_weights(x_TD, placement.routing, rows), ends_e, None, 0, output_weights(placement.routing), rows
        )

    def combine(self, y_RD: Tensor, sent: Dispatched) -> Tensor:
        assert isinstance(sent, LocalDispatched)
        return tokens_of_rows(y_RD, sent.weight_TK, sent.rows)
