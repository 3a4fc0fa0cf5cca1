"""Balanced assignment of tokens to experts by an auction: who has the most to lose elsewhere gets the seat."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_ROUNDS = 100
FINITE = 1e30


def balanced_assignment(affinity_TE: Tensor) -> Tensor:
    """One expert a token, int64 [T]: every expert gets T / E tokens, and the sum of affinities is close to its maximum.

    Where E does not divide T, an expert gets one more than T // E if it is the favourite of enough tokens: the T % E
    most wanted experts do. The auction (Bertsekas 1992, for objects that are alike) raises prices by
    ``max(range / 50, 1e-4)`` at least; if it ends within ``MAX_ROUNDS``, the sum is within T times that of the maximum.
    What has no seat by then takes the best free one, those with the highest affinity first. Deterministic.

    A loop on the host, which reads one flag from the device before every round and nothing else: at most
    ``MAX_ROUNDS`` flags for the auction and E for the seats after it. Each round is vectorised over tokens.
    """
    affinity_TE = affinity_TE.detach().float().nan_to_num(0.0, FINITE, -FINITE)
    num_tokens, num_experts = affinity_TE.shape
    expert_T = torch.full((num_tokens,), num_experts, device=affinity_TE.device)
    if num_tokens == 0:
        return expert_T
    seats_E = _seats(affinity_TE)
    affinity_TE = affinity_TE.masked_fill(seats_E == 0, -2 * FINITE)
    bid_T, price_E = torch.zeros_like(affinity_TE[:, 0]), torch.zeros_like(affinity_TE[0])
    lowest = affinity_TE.masked_fill(seats_E == 0, float("inf")).min()
    step = ((affinity_TE.max() - lowest) / 50).clamp_min(1e-4)
    for _ in range(MAX_ROUNDS):
        waiting_T = expert_T == num_experts
        if not waiting_T.any():
            return expert_T
        asked_T, offer_T = _offers(affinity_TE, price_E, step)
        expert_T, bid_T = torch.where(waiting_T, asked_T, expert_T), torch.where(waiting_T, offer_T, bid_T)
        expert_T = _highest_bidders(expert_T, bid_T, seats_E)
        price_E = _prices(expert_T, bid_T, seats_E)
    return _fill(affinity_TE, expert_T, seats_E)


def _seats(affinity_TE: Tensor) -> Tensor:
    """How many tokens each expert is to get, int64 [E]."""
    num_tokens, num_experts = affinity_TE.shape
    wanted_E = _counts(affinity_TE.argmax(1), num_experts)
    rank_E = wanted_E.argsort(descending=True, stable=True).argsort()
    return num_tokens // num_experts + (rank_E < num_tokens % num_experts).to(torch.int64)


def _offers(affinity_TE: Tensor, price_E: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """The expert of best value to each token, and the price at which it would be no better than the next best one."""
    value_TE = affinity_TE - price_E
    best_T1 = value_TE.argmax(1, keepdim=True)
    first_T1 = value_TE.gather(1, best_T1)
    second_T1 = value_TE.scatter(1, best_T1, float("-inf")).amax(1, keepdim=True)
    gain_T1 = torch.where(second_T1 > -FINITE * 1.5, first_T1 - second_T1, 0.0)
    return best_T1.squeeze(1), (price_E[best_T1] + gain_T1 + step).squeeze(1)


def _highest_bidders(expert_T: Tensor, bid_T: Tensor, seats_E: Tensor) -> Tensor:
    """``expert_T``, with E (no expert) for those whose bid is not among the highest that their expert has seats for."""
    num_experts = seats_E.shape[0]
    by_bid_T = bid_T.argsort(descending=True, stable=True)
    order_T = by_bid_T[expert_T[by_bid_T].argsort(stable=True)]
    sorted_T = expert_T[order_T]
    counts_E = _counts(expert_T, num_experts + 1)
    place_T = torch.arange(len(order_T), device=order_T.device) - (counts_E.cumsum(0) - counts_E)[sorted_T]
    has_seat_T = place_T < torch.cat([seats_E, seats_E.new_zeros(1)])[sorted_T]
    return torch.empty_like(expert_T).scatter(0, order_T, torch.where(has_seat_T, sorted_T, num_experts))


def _prices(expert_T: Tensor, bid_T: Tensor, seats_E: Tensor) -> Tensor:
    """The lowest bid that holds a seat of a full expert; a seat of any other costs nothing yet."""
    num_experts = seats_E.shape[0]
    lowest_E = bid_T.new_full((num_experts + 1,), float("inf")).scatter_reduce(0, expert_T, bid_T, "amin")[:-1]
    full_E = _counts(expert_T, num_experts + 1)[:-1] == seats_E
    return torch.where(full_E & (seats_E > 0), lowest_E, 0.0)


def _fill(affinity_TE: Tensor, expert_T: Tensor, seats_E: Tensor) -> Tensor:
    """Seat those that wait, without moving anyone: a round fills an expert or ends it."""
    num_experts = seats_E.shape[0]
    for _ in range(num_experts):
        waiting_T = expert_T == num_experts
        if not waiting_T.any():
            break
        full_E = _counts(expert_T, num_experts + 1)[:-1] >= seats_E
        best_T = affinity_TE.masked_fill(full_E, float("-inf")).argmax(1)
        bid_T = torch.where(waiting_T, affinity_TE.gather(1, best_T.unsqueeze(1)).squeeze(1), float("inf"))
        expert_T = _highest_bidders(torch.where(waiting_T, best_T, expert_T), bid_T, seats_E)
    return expert_T


def _counts(expert_T: Tensor, num_experts: int) -> Tensor:
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=expert_T.device)
    return counts_E.scatter_add_(0, expert_T, torch.ones_like(expert_T))
