"""One copy of a token for each rank that holds any of its experts, and one weighted sum of their results back.

The bytes of a round trip fall from k rows a token to the number of ranks it reaches: under a uniform routing over G
ranks to G (1 - (1 - 1/G)^k), a quarter at k = 8 on two ranks. The weights travel along, so that the sum is taken where
the experts are; their gradients come home the same way (DeepEP, DeepSeek 2025, sends one copy a node so).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moetrain.moe.dispatch.base import Sharded, Trip
from moetrain.moe.dispatch.local import rows_by_expert
from moetrain.ops.permute import rows_of_tokens, tokens_of_rows
from moetrain.ops.slots import count_experts
from moetrain.parallel.exchange import start_counts
from moetrain.types import Dispatched, Placement, RowMap


class DedupDispatcher(Sharded):
    """Dropless, or under a capacity. One host read, of how many copies and rows there are."""

    def trip(self, x_TD: Tensor, placement: Placement) -> Trip:
        routing, num_ranks = placement.routing, self.mesh.ep_size
        reaches_TG = self._reaches(placement)
        counts_E = count_experts(routing.expert_TK, self.num_experts, placement.kept_TK)
        to_Gx = torch.cat([counts_E.view(num_ranks, self.num_local), reaches_TG.sum(0).unsqueeze(1)], dim=1)
        counted = start_counts(to_Gx, self.mesh.ep_group)
        yield None
        from_Gx = counted.wait()
        from_Ge = from_Gx[:, :-1]
        *numbers, num_rows = torch.cat([to_Gx[:, -1], from_Gx[:, -1], from_Ge.sum().unsqueeze(0)]).tolist()
        send, receive = numbers[:num_ranks], numbers[num_ranks:]
        yield None
        copies, route = copies_by_rank(reaches_TG, sum(send)), self.route(send, receive)
        tokens = self.start(rows_of_tokens(x_TD, copies), route, "dispatch")
        tags = self.start(self._tags(placement, copies), replace(route, there="exact", back="exact"), "dispatch")
        yield None
        x_CD = self.land(tokens, "dispatch")
        expert_CK, weight_CK = self.land(tags, "dispatch").chunk(2, dim=1)
        expert_CK = expert_CK.long()
        rows = rows_by_expert(expert_CK, expert_CK < self.num_local, self.num_local, num_rows)
        ends_e, from_others = from_Ge.sum(0).cumsum(0).to(torch.int32), sum(receive) - receive[self.mesh.ep_rank]
        sums_CD = yield Dispatched(x_CD, rows, weight_CK, ends_e, None, from_others, routing.weight_on)
        assert sums_CD is not None
        home = self.start(sums_CD, self.home(send, receive), "combine")
        yield None
        return tokens_of_rows(self.land(home, "combine"), None, copies)

    def _reaches(self, placement: Placement) -> Tensor:
        """Whether a token has any expert on a rank, bool [T, G]."""
        expert_TK, num_ranks = placement.routing.expert_TK, self.mesh.ep_size
        rank_TK = (expert_TK // self.num_local).masked_fill(~placement.kept_TK, num_ranks)
        none_TG = torch.zeros(expert_TK.shape[0], num_ranks + 1, dtype=torch.bool, device=expert_TK.device)
        return none_TG.scatter_(1, rank_TK, True)[:, :num_ranks]

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
