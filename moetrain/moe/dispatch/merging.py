"""One copy of a token for each place that holds any of its experts, and one sum of their results back, hop by hop.

A hop shares experts out to places that hold equally many each, in order. Beside its row a copy carries the experts that
it is for, counted within its place, and their weights: so the next hop, and in the end the experts' rank, needs nothing
else. Sums come home over the same hops, and the gradients of the weights with those of the rows.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from moetrain.moe.dispatch.base import Departure, Sharded, Trip
from moetrain.moe.dispatch.local import rows_by_expert
from moetrain.ops.permute import rows_of_tokens, tokens_of_rows
from moetrain.ops.slots import count_experts
from moetrain.parallel.exchange import start_counts
from moetrain.parallel.mesh import Hop
from moetrain.types import Dispatched, Placement, RowMap


@dataclass(frozen=True)
class _Copies:
    """Tokens, or copies of them. expert_CK: int64, counted within ``num_experts``, which itself stands for none.
    weight_CK: fp32.
    """

    x_CD: Tensor
    expert_CK: Tensor
    weight_CK: Tensor
    num_experts: int


@dataclass(frozen=True)
class _Leg:
    """A hop, and the copies that go to each of its places and come from them."""

    hop: Hop
    send: list[int]
    receive: list[int]

    @property
    def num_from_others(self) -> int:
        return sum(self.receive) - self.receive[self.hop.place]


@dataclass(frozen=True)
class _Plan:
    """What a part of the tokens needs on its way. ends_e: where the rows of each expert end here, int32."""

    legs: list[_Leg]
    ends_e: Tensor
    num_rows: int


class Merging(Sharded):
    """Dropless, or under a capacity. One host read, of how many copies and rows there are, whatever the number of hops
    and of chunks: counts of all chunks are exchanged hop by hop before it.
    """

    hops: tuple[Hop, ...]

    def depart(self, x_TD: Tensor, placement: Placement) -> Departure:
        tokens = []
        for part_TD, part in self.split(x_TD, placement):
            expert_TK = part.routing.expert_TK.masked_fill(~part.kept_TK, self.num_experts)
            tokens.append(_Copies(part_TD, expert_TK, part.routing.weight_TK, self.num_experts))
        reached, told = zip(*map(self._tell, tokens), strict=True)
        plans = yield from self._plan(torch.stack(told, dim=1))
        weight_on = placement.routing.weight_on
        return [self._trip(*part, weight_on) for part in zip(tokens, reached, plans, strict=True)]

    def _trip(self, copies: _Copies, reaches_CP: Tensor, plan: _Plan, weight_on: Literal["output", "input"]) -> Trip:
        """reaches_CP: ``_reaches`` of the first hop."""
        legs, maps, num_local = plan.legs, list[RowMap](), self.num_local
        for leg in legs:
            if maps:
                reaches_CP = _reaches(copies, leg.hop.num_places)
            maps.append(copies_by_place(reaches_CP, sum(leg.send)))
            copies = yield from self._go(copies, maps[-1], leg)
        rows = rows_by_expert(copies.expert_CK, copies.expert_CK < num_local, num_local, plan.num_rows)
        travelled = sum(leg.num_from_others for leg in legs)
        sums_CD = yield Dispatched(copies.x_CD, rows, copies.weight_CK, plan.ends_e, None, travelled, weight_on)
        assert sums_CD is not None
        for leg, sent in zip(reversed(legs), reversed(maps), strict=True):
            home = self.start(sums_CD, replace(self.home(leg.send, leg.receive), group=leg.hop.group), "combine")
            if leg.hop is self.hops[0]:
                yield None
            sums_CD = tokens_of_rows(self.land(home, "combine"), None, sent)
        return sums_CD

    def _tell(self, tokens: _Copies) -> tuple[Tensor, Tensor]:
        """Which places of the first hop each token goes to, [T, P]; and what each of those is told, [P, X].

        That is how many copies go to it, then the same for each place of the next hop from there, and in the end the
        rows of each expert.
        """
        reaches_TP = _reaches(tokens, self.mesh.ep_size)
        counts_E = count_experts(tokens.expert_CK, self.num_experts + 1)[:-1]
        told_PX = torch.cat([reaches_TP.sum(0).unsqueeze(1), counts_E.view(-1, self.num_local)], dim=1)
        for hop in reversed(self.hops[1:]):
            reaches_TP = reaches_TP.unflatten(1, (-1, hop.num_places)).any(2)
            told_PX = torch.cat([reaches_TP.sum(0).unsqueeze(1), told_PX.view(reaches_TP.shape[1], -1)], dim=1)
        return reaches_TP, told_PX

    def _plan(self, told_PQX: Tensor) -> Generator[None, None, list[_Plan]]:
        """Of Q parts. What a rank has heard from all places of a hop together, it has to tell those of the next."""
        counted = start_counts(told_PQX, self.hops[0].group)
        yield
        heard_PQX = counted.wait()
        numbers = [told_PQX[..., 0], heard_PQX[..., 0]]
        for hop in self.hops[1:]:
            told_PQX = heard_PQX[..., 1:].sum(0).unflatten(1, (hop.num_places, -1)).transpose(0, 1)
            heard_PQX = start_counts(told_PQX, hop.group).wait()
            numbers += [told_PQX[..., 0], heard_PQX[..., 0]]
        ends_Qe = heard_PQX[..., 1:].sum(0).cumsum(1)
        numbers_QX, plans = torch.cat([*numbers, ends_Qe[:, -1:].t()]).t(), []
        for ends_e, read in zip(ends_Qe.to(torch.int32), numbers_QX.tolist(), strict=True):
            sizes = iter(read)
            legs = [_Leg(hop, *(list(islice(sizes, hop.num_places)) for _ in range(2))) for hop in self.hops]
            plans.append(_Plan(legs, ends_e, next(sizes)))
        return plans

    def _go(self, copies: _Copies, sent: RowMap, leg: _Leg) -> Generator[None, None, _Copies]:
        """One hop; what has arrived here."""
        num_local = copies.num_experts // leg.hop.num_places
        route = replace(self.route(leg.send, leg.receive), group=leg.hop.group)
        rows = self.start(rows_of_tokens(copies.x_CD, sent), route, "dispatch")
        tags = self.start(_tags(copies, sent, num_local), replace(route, there="exact", back="exact"), "dispatch")
        if leg.hop is self.hops[0]:  # only the longest way is left to hide behind what others compute meanwhile
            yield None
        x_CD = self.land(rows, "dispatch")
        expert_CK, weight_CK = self.land(tags, "dispatch").chunk(2, dim=1)
        return _Copies(x_CD, expert_CK.long(), weight_CK, num_local)


def _reaches(copies: _Copies, num_places: int) -> Tensor:
    """Whether a copy is for any expert of a place, bool [C, P]."""
    place_CK = copies.expert_CK // (copies.num_experts // num_places)
    none_CP = torch.zeros(place_CK.shape[0], num_places + 1, dtype=torch.bool, device=place_CK.device)
    return none_CP.scatter_(1, place_CK, True)[:, :num_places]


def _tags(copies: _Copies, sent: RowMap, num_local: int) -> Tensor:
    """What a copy carries beside its row, fp32 [C, 2K]: its experts within its place, where none is ``num_local``; then
    their weights. A place has no more than ``num_local`` for a token, so neither has a copy.
    """
    expert_CK, place_C = copies.expert_CK[sent.token_R], sent.assignment_R % sent.row_TK.shape[1]
    is_here_CK = expert_CK // num_local == place_C.unsqueeze(1)
    weight_CK = rows_of_tokens(copies.weight_CK, sent) * is_here_CK
    expert_CK = (expert_CK % num_local).masked_fill(~is_here_CK, num_local)
    if expert_CK.shape[1] > num_local:
        first_CK = torch.argsort((~is_here_CK).to(torch.uint8), dim=1, stable=True)[:, :num_local]
        expert_CK, weight_CK = expert_CK.gather(1, first_CK), weight_CK.gather(1, first_CK)
    return torch.cat([expert_CK.to(weight_CK.dtype), weight_CK], dim=1)


def copies_by_place(reaches_CP: Tensor, num_copies: int) -> RowMap:
    """Copies in order of the place they go to, then of their token; no host read."""
    num_tokens, num_places = reaches_CP.shape
    reaches_N = reaches_CP.t().reshape(-1)
    row_N = torch.where(reaches_N, reaches_N.cumsum(0) - 1, num_copies)
    row_CP = row_N.view(num_places, num_tokens).t().contiguous()
    pair_N = torch.arange(row_CP.numel(), device=row_CP.device)
    assignment_R = torch.empty(num_copies + 1, dtype=torch.int64, device=row_CP.device)
    return RowMap(assignment_R.scatter_(0, row_CP.reshape(-1), pair_N)[:num_copies], row_CP, has_empty=False)
