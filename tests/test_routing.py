"""The seed's routing algorithm, its capacity and its losses, one process."""

from __future__ import annotations

import pytest
import torch

from moetrain.config import BalanceConfig, CapacityConfig
from moetrain.moe.balance import Balance
from moetrain.moe.capacity import Capacity, slots_per_expert
from moetrain.moe.replay import Replay
from moetrain.moe.routers.token_choice import TokenChoiceRouter
from moetrain.types import Routing
from tests.tiny import alone, seen, site

CPU = torch.device("cpu")


def routing_of(expert_TK: torch.Tensor, num_experts: int) -> Routing:
    logits_TE = torch.randn(expert_TK.shape[0], num_experts)
    return Routing(logits_TE, logits_TE.softmax(-1), expert_TK, torch.rand(expert_TK.shape))


def seed_combine_tensor(logits_TE: torch.Tensor, top_k: int, capacity: int) -> torch.Tensor:
    """ROUTING the way it was first written down: a dense [T, E, C] tensor of weights."""
    num_tokens, num_experts = logits_TE.shape
    top, expert_TK = logits_TE.topk(top_k)
    weight_TK = top.softmax(-1)
    mask = torch.nn.functional.one_hot(expert_TK, num_experts).permute(1, 0, 2).reshape(-1, num_experts)
    slot = ((mask.cumsum(0) - 1) * mask).sum(-1).view(top_k, num_tokens)
    combine = torch.zeros(num_tokens, num_experts, capacity)
    for choice in range(top_k):
        for token in range(num_tokens):
            if slot[choice, token] < capacity:
                expert = expert_TK[token, choice]
                combine[token, expert, slot[choice, token]] = weight_TK[token, choice]
    return combine


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
def test_routing_is_the_seeds_weight_tensor(top_k: int, factor: float) -> None:
    torch.manual_seed(top_k)
    x_TD = torch.randn(32, 6)
    layer = TokenChoiceRouter(site=site(), top_k=top_k, select="logits", weights="chosen_softmax")
    torch.nn.init.normal_(layer.gate)
    placement = Capacity(CapacityConfig(factor_train=factor, minimum=1), 5, top_k, alone())(
        layer(seen(x_TD), Replay()), 1, Replay()
    )
    capacity = slots_per_expert(32, top_k, 5, factor, 1)
    assert placement.capacity == capacity
    ours = torch.zeros(32, 5, capacity)
    for token, choice in placement.kept_TK.nonzero().tolist():
        expert = placement.routing.expert_TK[token, choice]
        ours[token, expert, placement.slot_TK[token, choice]] = placement.routing.weight_TK[token, choice]
    reference = seed_combine_tensor(x_TD @ layer.gate.t(), top_k, capacity)
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "factor", "minimum", "expected"),
    [
        (64, 2, 8, 1.25, 4, 20),
        (64, 2, 8, 1.1, 4, 18),
        (8, 1, 8, 1.0, 4, 4),
        (24, 1, 8, 1.0, 1, 4),
        (0, 2, 8, 1.0, 4, 4),
    ],
)
def test_slots_per_expert(tokens: int, top_k: int, experts: int, factor: float, minimum: int, expected: int) -> None:
    assert slots_per_expert(tokens, top_k, experts, factor, minimum) == expected


def test_capacity_has_separate_factors_for_training_and_eval() -> None:
    routing = routing_of(torch.zeros(40, 1, dtype=torch.int64), 4)
    capacity = Capacity(CapacityConfig(factor_train=1.0, factor_eval=2.0, minimum=1), 4, 1, alone())
    assert int(capacity(routing, 1, Replay()).kept_TK.sum()) == 10
    assert int(capacity.eval()(routing, 1, Replay()).kept_TK.sum()) == 20


def test_kept_and_dropped_conserve_and_slots_are_unique() -> None:
    torch.manual_seed(0)
    routing = routing_of(torch.rand(50, 6).pow(3).topk(2).indices, 6)
    placement = Capacity(CapacityConfig(factor_train=0.7, minimum=1), 6, 2, alone())(routing, 1, Replay())
    taken = [
        (e, s) for e, s in zip(routing.expert_TK[placement.kept_TK], placement.slot_TK[placement.kept_TK], strict=True)
    ]
    pairs = {(int(e), int(s)) for e, s in taken}
    assert len(pairs) == len(taken) == int(placement.kept_TK.sum()) < 100
    assert max(s for _, s in pairs) < (placement.capacity or 0)


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
def test_balance_loss_is_one_when_even_and_e_over_k_when_collapsed(scope: str) -> None:
    balance = Balance(BalanceConfig(scope=scope), 8, alone())  # type: ignore[arg-type]
    none_yet = torch.zeros(8, dtype=torch.int64)
    even_TK = torch.arange(32).remainder(8).view(16, 2)
    flat = torch.full((16, 8), 1 / 8)
    even = balance(Routing(torch.zeros(16, 8), flat, even_TK, flat[:, :2]), 2, none_yet)
    assert even.balance.item() == pytest.approx(1.0)
    assert even.z.item() == pytest.approx(torch.tensor(8.0).log().item() ** 2)
    collapsed_TK = torch.tensor([[0, 1]]).expand(16, 2)
    onto_two = torch.zeros(16, 8)
    onto_two[:, :2] = 0.5
    collapsed = balance(Routing(torch.zeros(16, 8), onto_two, collapsed_TK, onto_two[:, :2]), 2, none_yet)
    assert collapsed.balance.item() == pytest.approx(8 / 2)


def test_trap17_layers_that_collapse_on_different_experts_do_not_cancel() -> None:
    """Concatenating layers (as one library does) reads 'balanced' when four layers collapse on four different pairs."""
    balance = Balance(BalanceConfig(), 8, alone())
    values = []
    for layer in range(4):
        pair = torch.tensor([2 * layer, 2 * layer + 1])
        probs_TE = torch.zeros(16, 8)
        probs_TE[:, pair] = 0.5
        routing = Routing(torch.zeros(16, 8), probs_TE, pair.expand(16, 2), probs_TE[:, :2])
        values.append(balance(routing, 2, torch.zeros(8, dtype=torch.int64)).balance)
    assert torch.stack(values).mean().item() == pytest.approx(4.0)


def test_balance_counts_are_taken_before_dropping() -> None:
    """The loss sees the routing alone, so it cannot be calmed by dropping what is too much."""
    routing = routing_of(torch.zeros(40, 1, dtype=torch.int64), 4)
    Capacity(CapacityConfig(factor_train=0.5, minimum=1), 4, 1, alone())(routing, 1, Replay())
    loss = Balance(BalanceConfig(), 4, alone())(routing, 1, torch.zeros(4, dtype=torch.int64))
    assert loss.balance.item() == pytest.approx(4 * routing.probs_TE[:, 0].mean().item(), rel=1e-5)


def test_global_batch_counts_run_on_over_micro_batches() -> None:
    """TRAPS T4: the denominator accumulates with the counts."""
    balance = Balance(BalanceConfig(scope="global_batch"), 4, alone())
    probs_TE = torch.tensor([[0.7, 0.1, 0.1, 0.1]]).expand(6, 4)
    routing = Routing(torch.zeros(6, 4), probs_TE, torch.zeros(6, 1, dtype=torch.int64), probs_TE[:, :1])
    loss = balance(routing, 1, torch.tensor([0, 6, 6, 6]))
    assert loss.balance.item() == pytest.approx(1.0)
