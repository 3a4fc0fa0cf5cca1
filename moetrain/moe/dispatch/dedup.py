"""One copy of a token for each rank that holds any of its experts, and one weighted sum of their results back.

The bytes of a round trip fall from k rows a token to the number of ranks it reaches: under a uniform routing over G
ranks to G (1 - (1 - 1/G)^k), a quarter at k = 8 on two ranks. The weights travel along, so that the sum is taken where
the experts are; their gradients come home the same way (DeepEP, DeepSeek 2025, sends one copy a node so).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moetrain.moe.dispatch.base import Dispatcher, output_weights, with_input_weights
from moetrain.moe.dispatch.local import rows_by_expert
from moetrain.ops.permute import RowMap, rows_of_tokens, tokens_of_rows
from moetrain.ops.slots import count_experts
from moetrain.parallel.collectives import exchange_counts
from moetrain.types import Dispatched, Placement


@dataclass(frozen=True)
class DedupDispatched(Dispatched):
    """weight_CK: of the copies that arrived here, fp32. rows: from those copies to the experts' rows. copies: from this
    rank's tokens to the copies that it sent. send, receive: copies to and from each rank.
    """

    weight_CK: Tensor
    rows: RowMap
    copies: RowMap
    send: list[int]
    receive: list[int]


class DedupDispatcher(Dispatcher):
    """Dropless, or under a capacity. One host read, of how many copies and rows there are."""

    def forward(self, x_TD: Tensor, placement: Placement) -> DedupDispatched:
        routing, num_ranks = placement.routing, self.mesh.ep_size
        rank_TK = (routing.expert_TK // self.num_local).masked_fill(~placement.kept_TK, num_ranks)
        reaches_TG = x_TD.new_zeros(x_TD.shape[0], num_ranks + 1, dtype=torch.bool).scatter_(1, rank_TK, True)
        reaches_TG = reaches_TG[:, :num_ranks]
        counts_E = count_experts(routing.expert_TK, self.num_experts, placement.kept_TK)
        to_Gx = torch.cat([counts_E.view(num_ranks, self.num_local), reaches_TG.sum(0).unsqueeze(1)], dim=1)
        from_Gx = exchange_counts(to_Gx, self.mesh.ep_group)
        from_Ge = from_Gx[:, :-1]
        *numbers, num_rows = torch.cat([to_Gx[:, -1], from_Gx[:, -1], from_Ge.sum().unsqueeze(0)]).tolist()
        send, receive = numbers[:num_ranks], numbers[num_ranks:]
        copies = copies_by_rank(reaches_TG, sum(send))
        x_CD = self.exchange(rows_of_tokens(x_TD, copies), send, receive, "dispatch")
        expert_CK, weight_CK = self.exchange(self._tags(placement, copies), send, receive, "dispatch").chunk(2, dim=1)
        expert_CK = expert_CK.long()
        rows = rows_by_expert(expert_CK, expert_CK < self.num_local, self.num_local, num_rows)
        arrived = replace(routing, expert_TK=expert_CK, weight_TK=weight_CK)
        rows_RD = with_input_weights(x_CD, arrived, rows)
        ends_e = from_Ge.sum(0).cumsum(0).to(torch.int32)
        weights_CK, from_others = output_weights(arrived), sum(receive) - receive[self.mesh.ep_rank]
        return DedupDispatched(rows_RD, ends_e, None, from_others, weights_CK, rows, copies, send, receive)

    def combine(self, y_RD: Tensor, sent: Dispatched) -> Tensor:
        assert isinstance(sent, DedupDispatched)
        sums_CD = tokens_of_rows(y_RD, sent.weight_CK, sent.rows)
        home_CD = self.exchange(sums_CD, sent.receive, sent.send, "combine")
        ones_TG = torch.ones(sent.copies.row_TK.shape, device=y_RD.device)
        return tokens_of_rows(home_CD, ones_TG, sent.copies)

    def _tags(self, placement: Placement, copies: RowMap) -> Tensor:
        """What a copy carries beside its row, fp32 [C, 2K]: the experts it is for, counted on their rank, where none is
        ``num_local``; then their weights. A rank has no more than ``num_local`` for a token, so neither has a copy.
        """
        routing, rank_C = placement.routing, copies.assignment_R % self.mesh.ep_size
        expert_CK = routing.expert_TK[copies.token_R]
        is_here_CK = placement.kept_TK[copies.token_R] & (expert_CK // self.num_local == rank_C.unsqueeze(1))
        weight_CK = rows_of_tokens(routing.weight_TK, copies) * is_here_CK
        expert_CK = (expert_CK % self.num_local).masked_fill(~is_here_CK, self.num_local)
        if expert_CK.shape[1] > self.num_local:
            first_CK = torch.argsort((~is_here_CK).to(torch.uint8), dim=1, stable=True)[:, : self.num_local]
            expert_CK, weight_CK = expert_CK.gather(1, first_CK), weight_CK.gather(1, first_CK)
        return torch.cat([expert_CK.to(weight_CK.dtype), weight_CK], dim=1)


def copies_by_rank(reaches_TG: Tensor, num_copies: int) -> RowMap:
    """Copies in order of the rank they go to, then of their token; no host read."""
    num_tokens, num_ranks = reaches_TG.shape
    reaches_N = reaches_TG.t().reshape(-1)
    row_N = torch.where(reaches_N, reaches_N.cumsum(0) - 1, num_copies)
    row_TG = row_N.view(num_ranks, num_tokens).t().contiguous()
    pair_N = torch.arange(row_TG.numel(), device=row_TG.device)
    assignment_C = torch.empty(num_copies + 1, dtype=torch.int64, device=row_TG.device)
    return RowMap(assignment_C.scatter_(0, row_TG.reshape(-1), pair_N)[:num_copies], row_TG, has_empty=False)
