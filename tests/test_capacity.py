"""Who gets a slot, under every priority and scope, against plain loops; renormalised weights; one process or more."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.config import CapacityConfig
from moetrain.moe.capacity import Capacity, renormalised, slots_per_expert
from moetrain.moe.replay import Replay
from moetrain.parallel.mesh import mesh_of_world
from moetrain.rules.capacity import slots_under_a_limit
from moetrain.rules.layout import PADDED, padded_needs_capacity
from moetrain.types import Placement, Routing
from tests.ranks import run_ranks
from tests.tiny import alone, ids, moe_layer, tiny

DETERMINISTIC = ["choice_major", "token_major", "probs", "batch_prioritised"]
NUM_EXPERTS = 5


def random_routing(num_tokens: int, top_k: int, seed: int, ragged: bool = True) -> Routing:
    """Ragged rows, crowded experts, and weights of few different values, so that there are ties."""
    g = torch.Generator().manual_seed(seed)
    probs_TE = torch.randint(1, 4, (num_tokens, NUM_EXPERTS), generator=g).float()
    probs_TE[:, 0] += 1
    probs_TE = probs_TE / probs_TE.sum(1, keepdim=True)
    expert_TK = (torch.rand(num_tokens, NUM_EXPERTS, generator=g) * probs_TE).argsort(1, descending=True)[:, :top_k]
    weight_TK = torch.randint(1, 4, (num_tokens, top_k), generator=g).float() / 8
    valid_TK = torch.arange(top_k) < torch.randint(0, top_k + 1, (num_tokens, 1), generator=g) if ragged else None
    if valid_TK is not None:
        weight_TK = weight_TK * valid_TK
    return Routing(probs_TE.log(), probs_TE, expert_TK, weight_TK, valid_TK)


def served(routing: Routing, priority: str, tokens: range) -> list[tuple[int, int]]:
    """The assignments of ``tokens`` in the order in which they are served, by sorting a list."""
    valid = torch.ones_like(routing.expert_TK, dtype=torch.bool) if routing.valid_TK is None else routing.valid_TK
    pairs = [(t, k) for t, k in product(tokens, range(routing.expert_TK.shape[1])) if valid[t, k]]

    def best(t: int) -> float:
        return max(float(routing.probs_TE[t, routing.expert_TK[t, k]]) for u, k in pairs if u == t)

    keys: dict[str, Any] = {
        "choice_major": lambda pair: (pair[1], pair[0]),
        "token_major": lambda pair: pair,
        "probs": lambda pair: (-float(routing.weight_TK[pair]), pair),
        "batch_prioritised": lambda pair: (pair[1], -best(pair[0]), pair[0]),
    }
    return sorted(pairs, key=keys[priority])


def plain(routing: Routing, priority: str, slots: int, tokens: range) -> dict[tuple[int, int], tuple[int, int]]:
    """assignment -> (expert, slot), for what is kept."""
    taken, kept = [0] * NUM_EXPERTS, {}
    for pair in served(routing, priority, tokens):
        expert = int(routing.expert_TK[pair])
        if taken[expert] < slots:
            kept[pair] = (expert, taken[expert])
        taken[expert] += 1
    return kept


def kept_of(placement: Placement) -> dict[tuple[int, int], tuple[int, int]]:
    routing = placement.routing
    pairs = [(int(t), int(k)) for t, k in placement.kept_TK.nonzero().tolist()]
    return {pair: (int(routing.expert_TK[pair]), int(placement.slot_TK[pair])) for pair in pairs}


@pytest.mark.parametrize("priority", DETERMINISTIC)
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 24), st.integers(1, 4), st.integers(1, 6), st.booleans(), st.integers(0, 10**6))
def test_slots_are_those_of_a_plain_loop(
    priority: Any, num_tokens: int, top_k: int, slots: int, ragged: bool, seed: int
) -> None:
    routing = random_routing(num_tokens, top_k, seed, ragged)
    config = CapacityConfig(priority=priority, slots_train=slots)
    placement = Capacity(config, NUM_EXPERTS, top_k, alone())(routing, 1, Replay())
    assert placement.capacity == slots
    assert kept_of(placement) == plain(routing, priority, slots, range(num_tokens))


@pytest.mark.parametrize("priority", DETERMINISTIC)
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 3), st.integers(1, 4), st.integers(0, 10**6))
def test_each_sequence_has_its_own_slots(
    priority: Any, num_sequences: int, length: int, top_k: int, slots: int, seed: int
) -> None:
    routing = random_routing(num_sequences * length, top_k, seed)
    config = CapacityConfig(priority=priority, slots_train=slots, scope="sequence")
    placement = Capacity(config, NUM_EXPERTS, top_k, alone())(routing, num_sequences, Replay())
    wanted = {}
    for s in range(num_sequences):
        alone_kept = plain(routing, priority, slots, range(s * length, (s + 1) * length))
        wanted |= {pair: (expert, slot + s * slots) for pair, (expert, slot) in alone_kept.items()}
    assert placement.capacity == slots * num_sequences
    assert kept_of(placement) == wanted
    assert len(set(wanted.values())) == len(wanted)


def test_random_serves_everyone_alike_in_training_and_in_choice_major_order_in_eval() -> None:
    routing = random_routing(400, 1, 0, ragged=False)
    routing = replace(routing, expert_TK=torch.zeros(400, 1, dtype=torch.int64))
    layer = Capacity(CapacityConfig(priority="random", slots_train=100, slots_eval=100), NUM_EXPERTS, 1, alone())
    torch.manual_seed(0)
    replay = Replay()
    first, second = layer(routing, 1, replay).kept_TK, layer(routing, 1, Replay()).kept_TK
    assert int(first.sum()) == int(second.sum()) == 100
    assert not torch.equal(first, second)
    assert torch.equal(layer(routing, 1, replay).kept_TK, first), "recompute decides as before"
    assert 30 < int(first[200:].sum()) < 70
    layer.eval()
    assert layer(routing, 1, Replay()).kept_TK.flatten().tolist() == [True] * 100 + [False] * 300
    ragged = random_routing(40, 3, 1)
    layer = Capacity(CapacityConfig(priority="random", slots_train=1000), NUM_EXPERTS, 3, alone())
    assert torch.equal(layer(ragged, 1, Replay()).kept_TK, ragged.valid_TK), "no entry is kept that is no assignment"


def test_replay_keeps_the_slots_though_the_weights_move() -> None:
    layer, replay = Capacity(CapacityConfig(priority="probs", slots_train=2), NUM_EXPERTS, 2, alone()), Replay()
    routing = random_routing(20, 2, 0, ragged=False)
    first = layer(routing, 1, replay)
    other = replace(routing, weight_TK=routing.weight_TK.flip(0))
    assert torch.equal(layer(other, 1, replay).kept_TK, first.kept_TK)
    assert not torch.equal(layer(other, 1, Replay()).kept_TK, first.kept_TK)


def test_dropless_keeps_what_is_an_assignment() -> None:
    routing = random_routing(20, 3, 0)
    config = CapacityConfig(factor_train=None, scope="sequence", priority="probs")
    placement = Capacity(config, NUM_EXPERTS, 3, alone())(routing, 4, Replay())
    assert placement.capacity is None
    assert torch.equal(placement.kept_TK, routing.valid_TK)


@pytest.mark.parametrize(("scope", "tokens"), [("rank", 32), ("sequence", 8)])
def test_the_formula_counts_the_tokens_of_the_scope(scope: Any, tokens: int) -> None:
    layer = Capacity(CapacityConfig(factor_train=1.0, minimum=1, scope=scope), NUM_EXPERTS, 1.5, alone())
    per_queue = slots_per_expert(tokens, 1.5, NUM_EXPERTS, 1.0, 1)
    assert layer(random_routing(32, 2, 0), 4, Replay()).capacity == per_queue * 32 // tokens


def test_renormalised_weights_sum_to_what_they_summed_to_and_carry_a_gradient() -> None:
    routing = random_routing(30, 3, 5)
    weight_TK = torch.rand(30, 3) * routing.valid_TK
    routing = replace(routing, weight_TK=weight_TK)
    plainly = Capacity(CapacityConfig(slots_train=4), NUM_EXPERTS, 3, alone())(routing, 1, Replay())
    scaled = Capacity(CapacityConfig(slots_train=4, renormalise=True), NUM_EXPERTS, 3, alone())(routing, 1, Replay())
    kept_TK = scaled.kept_TK
    assert torch.equal(kept_TK, plainly.kept_TK)
    assert plainly.routing is routing
    lost_T = ~kept_TK.any(1)
    assert bool(lost_T.any())
    assert bool((kept_TK.any(1) & ~(kept_TK == routing.valid_TK).all(1)).any())
    new_TK = scaled.routing.weight_TK
    torch.testing.assert_close(new_TK.sum(1), weight_TK.sum(1).masked_fill(lost_T, 0.0))
    for t, k in kept_TK.nonzero().tolist():
        wanted = weight_TK[t, k] * weight_TK[t].sum() / weight_TK[t][kept_TK[t]].sum()
        torch.testing.assert_close(new_TK[t, k], wanted)
    assert bool((new_TK[~kept_TK] == 0).all())
    exact_TK = (0.1 + weight_TK.detach().double()).requires_grad_()
    torch.autograd.gradcheck(lambda w: renormalised(replace(routing, weight_TK=w), kept_TK).weight_TK, exact_TK)


@pytest.mark.parametrize("scope", ["rank", "sequence"])
@pytest.mark.parametrize("priority", [*DETERMINISTIC, "random"])
def test_padded_and_alltoall_agree_and_a_dropped_token_gives_zero(priority: str, scope: str) -> None:
    found = []
    for dispatch in ("alltoall", "padded"):
        config = tiny(dispatch=dispatch, capacity__factor_train=1.0, capacity__slots_train=1)
        config = replace(config, capacity=replace(config.capacity, priority=priority, scope=scope, renormalise=True))
        layer = moe_layer(config)
        torch.manual_seed(0)
        x_TD = torch.randn(24, 16)
        out_TD = layer(x_TD, ids(x_TD, 3), Replay()).hidden_TD
        out_TD.square().sum().backward()
        found.append([out_TD, layer.router.gate.grad, layer.experts.gate_up.grad])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)
    assert bool((found[0][0] == 0).all(1).any())


def on_a_rank(rank: int, world: int, cases: list[tuple[str, bool]]) -> list[tuple[Any, Any]]:
    mesh, found = mesh_of_world(1, torch.device("cpu")), []
    for priority, ragged in cases:
        whole = random_routing(12 * world, 3, 3, ragged)
        mine = slice(12 * rank, 12 * (rank + 1))
        valid_TK = None if whole.valid_TK is None else whole.valid_TK[mine]
        part = Routing(
            whole.logits_TE[mine], whole.probs_TE[mine], whole.expert_TK[mine], whole.weight_TK[mine], valid_TK
        )
        layer = Capacity(CapacityConfig(priority=priority, scope="global", factor_train=0.8), NUM_EXPERTS, 3, mesh)
        placement = layer(part, 2, Replay())
        found.append((placement.kept_TK.numpy(), placement.slot_TK.numpy() * placement.kept_TK.numpy()))
    return found


def test_global_scope_is_the_queue_of_one_process() -> None:
    cases = list(product(DETERMINISTIC, (False, True)))
    ranks = run_ranks(3, on_a_rank, cases)
    for number, (priority, ragged) in enumerate(cases):
        layer = Capacity(CapacityConfig(priority=priority, factor_train=0.8), NUM_EXPERTS, 3, alone())
        whole = layer(random_routing(36, 3, 3, ragged), 6, Replay())
        kept = torch.cat([torch.from_numpy(found[number][0]) for found in ranks])
        slot = torch.cat([torch.from_numpy(found[number][1]) for found in ranks])
        assert torch.equal(kept, whole.kept_TK), (priority, ragged)
        assert torch.equal(slot, whole.slot_TK * whole.kept_TK), (priority, ragged)
        assert 0 < int(kept.sum()) < kept.numel()


def test_what_cannot_be_is_refused() -> None:
    assert slots_under_a_limit(None, 64, when="train") is not None
    assert slots_under_a_limit(1.0, 64, when="train") is None
    assert padded_needs_capacity(PADDED, 1.0, 2.0, "global") is not None
    assert padded_needs_capacity(PADDED, 1.0, 2.0, "sequence") is None
