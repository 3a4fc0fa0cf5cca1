"""Fixed capacity, equal splits: every rank sends C slots for each expert, filled or empty. No host synchronisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.moe.dispatch.base import Dispatcher, output_weights, with_input_weights
from moetrain.ops.permute import RowMap, tokens_of_rows
from moetrain.types import Dispatched, Placement


@dataclass(frozen=True)
class PaddedDispatched(Dispatched):
    """weight_TK, the map back, and the slots per expert and source rank."""

    weight_TK: Tensor
    rows: RowMap
    capacity: int


class PaddedDispatcher(Dispatcher):
    """Needs a capacity of scope ``rank``: shapes then depend on nothing but configuration."""

    def forward(self, x_TD: Tensor, placement: Placement) -> PaddedDispatched:
        capacity = placement.capacity
        assert capacity is not None, "config.py lets no dropless run reach the padded dispatcher"
        rows = self._slots(placement, capacity)
        arrived_RD = self.exchange(with_input_weights(x_TD, placement.routing, rows), None, None, "dispatch")
        by_expert_RD = self._swap(arrived_RD, self.mesh.ep_size, self.num_local, capacity)
        per_expert = self.mesh.ep_size * capacity
        ends_e = torch.arange(1, self.num_local + 1, dtype=torch.int32, device=x_TD.device) * per_expert
        weights_TK, from_others = output_weights(placement.routing), (self.mesh.ep_size - 1) * self.num_local * capacity
        return PaddedDispatched(by_expert_RD, ends_e, per_expert, from_others, weights_TK, rows, capacity)

    def combine(self, y_RD: Tensor, sent: Dispatched) -> Tensor:
        assert isinstance(sent, PaddedDispatched)
        by_rank_RD = self._swap(y_RD, self.num_local, self.mesh.ep_size, sent.capacity)
        home_RD = self.exchange(by_rank_RD, None, None, "combine")
        return tokens_of_rows(home_RD, sent.weight_TK, sent.rows)

    def _slots(self, placement: Placement, capacity: int) -> RowMap:
        """Row expert * C + slot for what was kept; the other rows are empty."""
        num_rows = self.num_experts * capacity
        row_TK = placement.routing.expert_TK * capacity + placement.slot_TK
        row_TK = row_TK.masked_fill(~placement.kept_TK, num_rows)
        num_assignments = row_TK.numel()
        assignment_R = torch.full((num_rows + 1,), num_assignments, dtype=torch.int64, device=row_TK.device)
        assignment_R.scatter_(0, row_TK.reshape(-1), torch.arange(num_assignments, device=row_TK.device))
        return RowMap(assignment_R[:num_rows], row_TK, has_empty=True)

    @staticmethod
    def _swap(x_RD: Tensor, outer: int, inner: int, capacity: int) -> Tensor:
        """[outer, inner, C, D] -> [inner, outer, C, D], both flat in rows."""
        dim = x_RD.shape[1]
        return x_RD.view(outer, inner, capacity, dim).transpose(0, 1).reshape(-1, dim)
