"""Variable splits: each row travels to the rank of its expert, and nothing else travels. Dropless, or under a capacity.

One small all-to-all of counts comes first; its result is read by the host once, since the splits of the payload's
all-to-all are host integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.moe.dispatch.base import Dispatcher, output_weights, with_input_weights
from moetrain.moe.dispatch.local import rows_by_expert
from moetrain.ops.permute import RowMap, rows_of_tokens, tokens_of_rows
from moetrain.ops.slots import count_experts
from moetrain.parallel.collectives import exchange_counts
from moetrain.types import Dispatched, Placement


def expert_major(counts_Ge: Tensor, num_rows: int) -> Tensor:
    """Received rows lie rank by rank, within a rank expert by expert; the order that groups them by expert, int64
    [R].
    """
    num_ranks, num_local = counts_Ge.shape
    segment_R = torch.arange(num_ranks * num_local, device=counts_Ge.device).repeat_interleave(
        counts_Ge.reshape(-1), output_size=num_rows
    )
    return torch.argsort(segment_R % num_local, stable=True)


@dataclass(frozen=True)
class AllToAllDispatched(Dispatched):
    """weight_TK, the map back, rows sent to and received from each rank, and where each received row now stands."""

    weight_TK: Tensor
    rows: RowMap
    send: list[int]
    receive: list[int]
    arrival_R: Tensor


class AllToAllDispatcher(Dispatcher):
    """Every rank takes part in the same collectives whatever the routing, also when it sends or receives nothing."""

    def forward(self, x_TD: Tensor, placement: Placement) -> AllToAllDispatched:
        counts_E = count_experts(placement.routing.expert_TK, self.num_experts, placement.kept_TK)
        to_Ge = counts_E.view(self.mesh.ep_size, self.num_local)
        from_Ge = exchange_counts(to_Ge, self.mesh.ep_group)
        send, receive = torch.stack([to_Ge.sum(1), from_Ge.sum(1)]).tolist()
        rows = rows_by_expert(placement.routing.expert_TK, placement.kept_TK, self.num_experts, sum(send))
        arrived_RD = self.exchange(with_input_weights(x_TD, placement.routing, rows), send, receive, "dispatch")
        order_R = expert_major(from_Ge, sum(receive))
        arrival_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(order_R.numel(), device=order_R.device))
        by_expert_RD = reorder(arrived_RD, order_R, arrival_R)
        ends_e = from_Ge.sum(0).cumsum(0).to(torch.int32)
        weights_TK, from_others = output_weights(placement.routing), sum(receive) - receive[self.mesh.ep_rank]
        return AllToAllDispatched(by_expert_RD, ends_e, None, from_others, weights_TK, rows, send, receive, arrival_R)

    def combine(self, y_RD: Tensor, sent: Dispatched) -> Tensor:
        assert isinstance(sent, AllToAllDispatched)
        order_R = torch.empty_like(sent.arrival_R).scatter_(
            0, sent.arrival_R, torch.arange(sent.arrival_R.numel(), device=y_RD.device)
        )
        by_rank_RD = reorder(y_RD, sent.arrival_R, order_R)
        home_RD = self.exchange(by_rank_RD, sent.receive, sent.send, "combine")
        return tokens_of_rows(home_RD, sent.weight_TK, sent.rows)


def reorder(x_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
    """x_RD[order_R] for a permutation with its inverse: a gather forward, and a gather backward."""
    return rows_of_tokens(x_RD, RowMap(order_R, inverse_R.unsqueeze(1), has_empty=False))
