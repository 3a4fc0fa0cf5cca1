"""Variable splits: each row travels to the rank of its expert, and nothing else travels. Dropless, or under a capacity.

One small all-to-all of counts comes first; its result is read by the host, once for each chunk, since the splits of the
payload's all-to-all are host integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.moe.dispatch.base import Sharded, Trip, output_weights, with_input_weights
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

    def trip(self, x_TD: Tensor, placement: Placement) -> Trip:
        routing, kept_TK = placement.routing, placement.kept_TK
        counts_E = count_experts(routing.expert_TK, self.num_experts, kept_TK)
        to_Ge = counts_E.view(self.mesh.ep_size, self.num_local)
        counted = start_counts(to_Ge, self.mesh.ep_group)
        yield None
        from_Ge = counted.wait()
        send, receive = torch.stack([to_Ge.sum(1), from_Ge.sum(1)]).tolist()
        yield None
        rows = rows_by_expert(routing.expert_TK, kept_TK, self.num_experts, sum(send))
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
