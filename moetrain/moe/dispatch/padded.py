"""Fixed capacity, equal splits: every rank sends C slots for each expert, filled or empty. No host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.moe.dispatch.base import Departure, Sharded, Trip, output_weights, parts, with_input_weights
from moetrain.ops.permute import tokens_of_rows
from moetrain.types import Dispatched, Placement, RowMap


class PaddedDispatcher(Sharded):
    """Needs a capacity of scope ``rank``: shapes then depend on nothing but configuration. Chunks are parts of the
    slots, not of the tokens.
    """

    def depart(self, x_TD: Tensor, placement: Placement) -> Departure:
        assert placement.capacity is not None, "rules.layout lets no dropless run reach the padded dispatcher"
        yield
        return [self._trip(x_TD, placement, part) for part in parts(placement.capacity, self.chunks)]

    def join(self, parts: list[Tensor]) -> Tensor:
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def _trip(self, x_TD: Tensor, placement: Placement, part: slice) -> Trip:
        routing, capacity = placement.routing, part.stop - part.start
        rows = self._slots(placement, part)
        out = self.start(with_input_weights(x_TD, routing, rows), self.route(None, None), "dispatch")
        yield None
        arrived_RD, per_expert = self.land(out, "dispatch"), self.mesh.ep_size * capacity
        ends_e = torch.arange(1, self.num_local + 1, dtype=torch.int32, device=x_TD.device) * per_expert
        num_travelled = (self.mesh.ep_size - 1) * self.num_local * capacity
        y_RD = yield Dispatched(arrived_RD, self._expert_major(arrived_RD), None, ends_e, per_expert, num_travelled)
        assert y_RD is not None
        home = self.start(y_RD, self.home(None, None), "combine")
        yield None
        return tokens_of_rows(self.land(home, "combine"), output_weights(routing), rows)

    def _slots(self, placement: Placement, part: slice) -> RowMap:
        """Row expert * C + slot for what was kept and has one of these slots; the other rows are empty."""
        capacity, slot_TK = part.stop - part.start, placement.slot_TK - part.start
        num_rows, is_here_TK = self.num_experts * capacity, (slot_TK >= 0) & (slot_TK < capacity)
        row_TK = placement.routing.expert_TK * capacity + slot_TK
        row_TK = row_TK.masked_fill(~(placement.kept_TK & is_here_TK), num_rows)
        num_assignments = row_TK.numel()
        assignment_R = torch.full((num_rows + 1,), num_assignments, dtype=torch.int64, device=row_TK.device)
        assignment_R.scatter_(0, row_TK.reshape(-1), torch.arange(num_assignments, device=row_TK.device))
        return RowMap(assignment_R[:num_rows], row_TK, has_empty=True)

    def _expert_major(self, arrived_RD: Tensor) -> RowMap:
        """Slots lie rank by rank, within a rank expert by expert; their map to rows grouped by expert."""
        row_R = torch.arange(arrived_RD.shape[0], device=arrived_RD.device)
        shape = self.mesh.ep_size, self.num_local, -1
        order_R = row_R.view(shape).transpose(0, 1).reshape(-1)
        arrival_R = row_R.view(shape[1], shape[0], -1).transpose(0, 1).reshape(-1)
        return RowMap(order_R, arrival_R.unsqueeze(1), has_empty=False)
