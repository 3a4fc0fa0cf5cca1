"""Balanced assignment: even whatever happens, and close to the best of all assignments."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moetrain.ops import auction
from moetrain.ops.auction import balanced_assignment


class HostReads(TorchDispatchMode):
    """Counts operations after which the host must wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.flags, self.by_mask = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.flags += name == "_local_scalar_dense"
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        self.by_mask += name in ("nonzero", "masked_select") or any(
            index is not None and index.dtype == torch.bool for index in indices
        )
        return func(*args, **(kwargs or {}))


def best_sum(affinity_TE: Tensor, seats: list[int]) -> float:
    """The maximum over all assignments with that many seats, by trying all."""
    seat_of = [e for e, num in enumerate(seats) for _ in range(num)]
    orders = set(itertools.permutations(seat_of))
    return max(sum(affinity_TE[t, e].item() for t, e in enumerate(order)) for order in orders)


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(6, 3), (8, 2), (6, 6), (7, 3), (2, 4), (5, 4), (3, 1)])
def test_the_auction_comes_close_to_the_best_of_all_assignments(num_tokens: int, num_experts: int) -> None:
    exact = 0
    for seed in range(12):
        affinity_TE = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
        expert_T = balanced_assignment(affinity_TE)
        seats = torch.bincount(expert_T, minlength=num_experts).tolist()
        assert len(seats) == num_experts
        assert max(seats) - min(seats) <= 1
        total, best = affinity_TE.gather(1, expert_T.unsqueeze(1)).sum().item(), best_sum(affinity_TE, seats)
        assert total >= best - num_tokens * (affinity_TE.max() - affinity_TE.min()).item() / 50 - 1e-5
        exact += total >= best - 1e-5
    assert exact >= 6, "more than the bound promises: it is the best one in most cases"


@pytest.mark.parametrize("rounds", [0, 1, 100])
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(64, 8), (67, 8), (5, 8), (0, 8), (16, 1)])
def test_the_auction_is_even_whenever_it_is_cut_off(
    num_tokens: int, num_experts: int, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auction, "MAX_ROUNDS", rounds)
    same_TE = torch.ones(num_tokens, num_experts)
    for affinity_TE in (torch.randn(num_tokens, num_experts).cumsum(1), same_TE, same_TE / 0, -same_TE / 0):
        expert_T = balanced_assignment(affinity_TE)
        counts_E = torch.bincount(expert_T, minlength=num_experts)
        assert len(counts_E) == num_experts
        assert counts_E.max() - counts_E.min() <= 1
        assert torch.equal(expert_T, balanced_assignment(affinity_TE))


def greedy(affinity_TE: Tensor, seats: int) -> list[int]:
    """Tokens ask for the best expert that has seats left, which takes those that suit it best; nobody moves again."""
    expert_of, num_experts = {}, affinity_TE.shape[1]
    while len(expert_of) < len(affinity_TE):
        free = [e for e in range(num_experts) if list(expert_of.values()).count(e) < seats]
        asked = {t: max(free, key=affinity_TE[t].__getitem__) for t in range(len(affinity_TE)) if t not in expert_of}
        for e in free:
            left = seats - list(expert_of.values()).count(e)
            asking = sorted((t for t in asked if asked[t] == e), key=lambda t: -affinity_TE[t, e].item())
            expert_of |= dict.fromkeys(asking[:left], e)
    return [expert_of[t] for t in range(len(affinity_TE))]


def test_the_auction_ends_by_itself_and_beats_the_greedy_assignment(monkeypatch: pytest.MonkeyPatch) -> None:
    affinity_TE = torch.randn(256, 8, generator=torch.Generator().manual_seed(0)) + torch.arange(8) / 4
    by_auction = balanced_assignment(affinity_TE)
    monkeypatch.setattr(auction, "MAX_ROUNDS", 0)
    by_greed = balanced_assignment(affinity_TE)
    assert by_greed.tolist() == greedy(affinity_TE, 32)
    sums = [affinity_TE.gather(1, expert_T.unsqueeze(1)).sum().item() for expert_T in (by_auction, by_greed)]
    assert sums[0] > sums[1] + 20
    monkeypatch.setattr(auction, "MAX_ROUNDS", 50)
    assert torch.equal(balanced_assignment(affinity_TE), by_auction), "it took fewer rounds than that"


def test_the_auction_reads_nothing_but_its_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask as an index would be a read of the device too, since the size of what it picks is not known before."""
    wanted_TE = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    for rounds, affinity_TE in ((3, wanted_TE), (0, torch.ones(5, 8))):
        monkeypatch.setattr(auction, "MAX_ROUNDS", rounds)
        with HostReads() as reads:
            balanced_assignment(affinity_TE)
        assert reads.by_mask == 0
        assert rounds + 1 <= reads.flags <= rounds + 8


def test_odd_seats_go_to_the_favourites() -> None:
    affinity_TE = torch.zeros(7, 3)
    affinity_TE[:, 2] = 1.0
    assert torch.bincount(balanced_assignment(affinity_TE)).tolist() == [2, 2, 3]
