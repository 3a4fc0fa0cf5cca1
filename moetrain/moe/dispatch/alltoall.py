"""Variable splits: each row travels to the rank of its expert, and nothing else travels. Dropless, or under a capacity.

One small all-to-all of counts comes first; its result is read by the host, once for all chunks, since the splits of the
payload's all-to-alls are host integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.moe.dispatch.base import Departure, Sharded, Trip, output_weights, with_input_weights
from moetrain.moe.dispatch.local import rows_by_expert
from moetrain.ops.permute import tokens_of_rows
from moetrain.ops.slots import count_experts
from moetrain.parallel.exchange import start_counts
from moetrain.types import Dispatched, Placement, RowMap


def expert_major(counts_Ge: Tensor, num_rows: int) -> RowMap:
    """Received rows lie rank by rank, within a rank expert by expert; their map to rows grouped by expert."""
    num_ranks, num_local = counts_Ge.shape
    segment_R = torch.arange(num_ranks * num_local, device=counts_Ge.device).repeat_interleave(
        counts_Ge.reshape(-1), output_size=num_rows
    )
    order_R = torch.argsort(segment_R % num_local, stable=True)
    arrival_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(num_rows, device=order_R.device))
    return RowMap(order_R, arrival_R.unsqueeze(1), has_empty=False)


class AllToAllDispatcher(Sharded):
    """Every rank takes part in the same collectives whatever the routing, also when it sends or receives nothing."""

    def depart(self, x_TD: Tensor, placement: Placement) -> Departure:
        split = self.split(x_TD, placement)  # in Q parts
        counts = [count_experts(part.routing.expert_TK, self.num_experts, part.kept_TK) for _, part in split]
        to_GQe = torch.stack([counts_E.view(-1, self.num_local) for counts_E in counts], dim=1)
        counted = start_counts(to_GQe, self.mesh.ep_group)
        yield
        from_GQe = counted.wait()
        sizes = torch.stack([to_GQe.sum(2).t(), from_GQe.sum(2).t()], dim=1).tolist()
        found = zip(split, from_GQe.unbind(1), sizes, strict=True)
        return [self._trip(*part, from_Ge, *both) for part, from_Ge, both in found]

    def _trip(self, x_TD: Tensor, placement: Placement, from_Ge: Tensor, send: list[int], receive: list[int]) -> Trip:
        routing = placement.routing
        rows = rows_by_expert(routing.expert_TK, placement.kept_TK, self.num_experts, sum(send))
        out = self.start(with_input_weights(x_TD, routing, rows), self.route(send, receive), "dispatch")
        yield None
        arrived_RD, order = self.land(out, "dispatch"), expert_major(from_Ge, sum(receive))
        ends_e = from_Ge.sum(0).cumsum(0).to(torch.int32)
        num_travelled = sum(receive) - receive[self.mesh.ep_rank]
        y_RD = yield Dispatched(arrived_RD, order, None, ends_e, None, num_travelled)
        assert y_RD is not None
        home = self.start(y_RD, self.home(send, receive), "combine")
        yield None
        return tokens_of_rows(self.land(home, "combine"), output_weights(routing), rows)
