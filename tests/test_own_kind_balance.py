"""Routers of their own kind that even the load by themselves: expert choice, BASE, Sinkhorn, ReMoE, thresholds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain.moe.replay import Replay
from moetrain.moe.routers.base import Router, StepSeen
from moetrain.moe.routers.base_layers import BaseLayersRouter
from moetrain.moe.routers.expert_choice import ExpertChoiceRouter
from moetrain.moe.routers.expert_threshold import ExpertThresholdRouter
from moetrain.moe.routers.remoe import ReMoERouter
from moetrain.moe.routers.sinkhorn import SinkhornRouter, log_plan
from moetrain.ops.init import Draw
from moetrain.types import Routing
from tests.tiny import complete, seen, site


def made(kind: Callable[..., Router], std: float = 0.5, **settings: Any) -> Any:
    router = kind(site=site(), **settings)
    router.init_weights(Draw(3), std)
    return router


def tokens(num: int = 24, seed: int = 0, mean: float = 0.0) -> Tensor:
    return torch.randn(num, 6, generator=torch.Generator().manual_seed(seed)) + mean


def pairs(routing: Routing) -> set[tuple[int, int]]:
    """(token, expert) of every assignment."""
    assert routing.valid_TK is not None
    return {(t, int(routing.expert_TK[t, k])) for t, k in routing.valid_TK.nonzero().tolist()}


def adjusted(router: Router, *statistics: Tensor, layer: int = 0) -> None:
    """As after a step of one micro-batch, with statistics of all layers."""
    counts_LE = torch.zeros(len(statistics), 5, dtype=torch.int64)
    router.adjust(StepSeen(layer, counts_LE, torch.stack(statistics), 1))


@pytest.mark.parametrize("over", ["sequence", "micro_batch"])
@pytest.mark.parametrize("experts_per_token", [0.1, 1.0, 2.0, 5.0])
def test_expert_choice_by_the_formula(over: str, experts_per_token: float) -> None:
    router, x_TD = made(ExpertChoiceRouter, over=over, experts_per_token=experts_per_token), tokens(24)
    routing = router(seen(x_TD, 3), Replay())
    p = (x_TD @ router.gate.t()).softmax(-1)
    pool = 8 if over == "sequence" else 24
    take = max(int(pool * experts_per_token / 5), 1)
    expected = {
        (t, e)
        for start in range(0, 24, pool)
        for e in range(5)
        for t in sorted(range(start, start + pool), key=lambda t: -p[t, e].item())[:take]
    }
    assert pairs(routing) == expected
    weight_TE = torch.zeros(24, 5).scatter(1, routing.expert_TK, routing.weight_TK)
    for t, e in itertools.product(range(24), range(5)):
        assert weight_TE[t, e].item() == pytest.approx(p[t, e].item() if (t, e) in expected else 0.0)


def test_expert_choice_stays_within_its_sequence() -> None:
    x_TD = tokens(24)
    other_TD = torch.cat([x_TD[:12], tokens(12, seed=9) * 3])
    for over, same in (("sequence", True), ("micro_batch", False)):
        router = made(ExpertChoiceRouter, over=over)
        before, after = (router(seen(x, 2), Replay()) for x in (x_TD, other_TD))
        assert torch.equal(before.expert_TK[:12], after.expert_TK[:12]) == same
        assert torch.equal(before.valid_TK[:12], after.valid_TK[:12]) == same


def test_base_layers_assigns_in_training_and_takes_the_nearest_in_evaluation() -> None:
    router, x_TD = made(BaseLayersRouter), tokens(25, mean=0.5)
    torch.testing.assert_close(router.centroids @ router.centroids.t(), 0.01 * torch.eye(5))
    logits_TE = x_TD @ router.centroids.t()
    trained, evaluated = router(seen(x_TD), Replay()), router.eval()(seen(x_TD), Replay())
    assert torch.bincount(trained.expert_TK.flatten()).tolist() == [5] * 5
    assert torch.equal(evaluated.expert_TK.flatten(), logits_TE.argmax(-1))
    assert len(set(torch.bincount(evaluated.expert_TK.flatten(), minlength=5).tolist())) > 1
    for routing in (trained, evaluated):
        weight_TK = logits_TE.gather(1, routing.expert_TK).sigmoid()
        torch.testing.assert_close(routing.weight_TK, weight_TK)
        assert routing.identity_T is None


def plan_by_loops(logits_TE: Tensor, tolerance: float) -> Tensor:
    """The plan as it is usually written: scale rows and columns in turn until the columns' scale stands still."""
    cost_TE = logits_TE.double().exp()
    num_tokens, num_experts = cost_TE.shape
    v_E, error = torch.ones(num_experts, dtype=torch.float64), 1.0
    while error > tolerance:
        u_T = 1 / (cost_TE @ v_E) / num_tokens
        new_E = 1 / (u_T @ cost_TE) / num_experts
        v_E, error = new_E, (new_E - v_E).abs().mean().item()
    return u_T.unsqueeze(1) * cost_TE * v_E


def test_sinkhorns_plan() -> None:
    logits_TE = tokens(40) @ tokens(5, seed=1).t() * 0.5
    plan_TE = log_plan(logits_TE, 50).exp()
    torch.testing.assert_close(plan_TE, plan_by_loops(logits_TE, 1e-9).float(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(plan_TE.sum(0), torch.full((5,), 1 / 5))
    torch.testing.assert_close(plan_TE.sum(1), torch.full((40,), 1 / 40), rtol=1e-3, atol=0)
    assert torch.isfinite(log_plan(logits_TE * 1e3, 20)).all(), "exp(logits) would overflow"


@pytest.mark.parametrize("top_k", [1, 2])
def test_sinkhorn_evens_the_load_in_training_only(top_k: int) -> None:
    router, x_TD = made(SinkhornRouter, top_k=top_k, iterations=50), tokens(200, mean=0.7)
    logits_TE = x_TD @ router.gate.t()
    trained, evaluated = router(seen(x_TD), Replay()), router.eval()(seen(x_TD), Replay())
    assert torch.equal(trained.expert_TK, plan_by_loops(logits_TE.detach(), 1e-9).topk(top_k).indices)
    assert torch.equal(evaluated.expert_TK, logits_TE.topk(top_k).indices)
    even, greedy = (torch.bincount(r.expert_TK.flatten(), minlength=5).max() for r in (trained, evaluated))
    assert 2 * (even - 40 * top_k) < greedy - 40 * top_k
    activation_TE = logits_TE.sigmoid() if top_k == 1 else logits_TE.softmax(-1)
    torch.testing.assert_close(trained.weight_TK, activation_TE.gather(1, trained.expert_TK))


@pytest.mark.parametrize("logit_bias", [False, True])
def test_remoe_by_the_formula(logit_bias: bool) -> None:
    router, x_TD = made(ReMoERouter, l1_start=0.3, logit_bias=logit_bias), tokens(24)
    if logit_bias:
        torch.nn.init.normal_(router.gate_bias)
    routing = router(seen(x_TD), Replay())
    relu = (x_TD @ router.gate.t() + (router.gate_bias if logit_bias else 0.0)).relu().tolist()
    assert pairs(routing) == {(t, e) for t in range(24) for e in range(5) if relu[t][e] > 0}
    loss = 0.0
    for e in range(5):
        load = 5 / (2 * 24) * sum(row[e] > 0 for row in relu)
        loss += 0.3 * load * sum(row[e] for row in relu) / 24
    assert routing.own_loss.item() == pytest.approx(loss, rel=1e-4)
    for t in range(24):
        assert routing.weight_TK[t].tolist() == pytest.approx(sorted(relu[t], reverse=True))


def test_remoes_coefficient_moves_by_the_sparsity_of_all_layers() -> None:
    """Target: 2 of 5 active. Layer 0 has 3 of 10, layer 1 has 7 of 10: together too many."""
    few, many = torch.tensor([3.0, 10.0]), torch.tensor([7.0, 10.0])
    for layer in (0, 1):
        router = made(ReMoERouter, l1_start=0.1)
        adjusted(router, few, many, layer=layer)
        assert router.l1.item() == pytest.approx(0.12)
        adjusted(router, few, few, layer=layer)
        assert router.l1.item() == pytest.approx(0.1)
        adjusted(router, torch.tensor([4.0, 10.0]), torch.tensor([4.0, 10.0]), layer=layer)
        assert router.l1.item() == pytest.approx(0.1), "on target"
        for _ in range(30):
            adjusted(router, many, many, layer=layer)
        assert router.l1.item() == 1.0, "held at l1_max"


def remoe_sparsity(**settings: Any) -> float:
    """The share of zero weights after training on weights that want to be 1, tokens in pairs x, -x."""
    router = made(ReMoERouter, top_k=1, l1_start=1e-3, **settings)
    optimiser = torch.optim.SGD(router.parameters(), lr=0.3)
    half_TD = tokens(64)
    x_TD, shares = torch.cat([half_TD, -half_TD]), []
    for _ in range(150):
        routing = router(seen(x_TD), Replay())
        optimiser.zero_grad()
        (routing.own_loss + 0.1 * (routing.weight_TK.sum(-1) - 1).square().mean()).backward()
        optimiser.step()
        adjusted(router, router.statistics())
        shares.append(1 - len(pairs(routing)) / x_TD.shape[0] / 5)
    return sum(shares[-30:]) / 30


def test_remoe_needs_a_mean_or_a_bias_to_become_sparse() -> None:
    assert remoe_sparsity() == pytest.approx(0.5, abs=1e-6), "a logit and its negative: one of them is positive"
    assert remoe_sparsity(logit_bias=True) == pytest.approx(0.8, abs=0.06)


def test_expert_threshold_by_the_formula() -> None:
    router, x_TD = made(ExpertThresholdRouter, decay=0.75), tokens(24)
    router.threshold_E.copy_(torch.tensor([-0.5, 0.0, 0.5, 9.0, -9.0]))
    router.num_steps.fill_(1e6)
    before = router.threshold_E.tolist()
    routing = router(seen(x_TD), Replay())
    logits_TE = x_TD @ router.gate.t()
    expected = {(t, e) for t in range(24) for e in range(5) if logits_TE[t, e].item() > before[e]}
    assert pairs(routing) == expected
    weight_TE = torch.zeros(24, 5).scatter(1, routing.expert_TK, routing.weight_TK)
    for t, e in itertools.product(range(24), range(5)):
        sigmoid = 1 / (1 + math.exp(-logits_TE[t, e].item()))
        assert weight_TE[t, e].item() == pytest.approx(sigmoid if (t, e) in expected else 0.0, rel=1e-5)
    adjusted(router, torch.full((6,), 99.0), router.statistics(), layer=1)
    for e in range(5):
        tenth = sorted(logits_TE[:, e].tolist(), reverse=True)[24 * 2 // 5]
        assert router.threshold_E[e].item() == pytest.approx(0.75 * before[e] + 0.25 * tenth, rel=1e-5)


def test_thresholds_start_near_the_share_and_come_to_it() -> None:
    router = made(ExpertThresholdRouter, decay=0.5)
    unit_TD, mean = torch.nn.functional.normalize(tokens(500), dim=-1) * math.sqrt(6), 0.0
    for seed in range(40):
        router.init_weights(Draw(seed), 0.5)
        mean += len(pairs(router(seen(unit_TD), Replay()))) / 500 / 40
    assert mean == pytest.approx(2.0, abs=0.2), "tokens of mean square 1"
    skewed_TD = tokens(4000, mean=0.8)
    for _ in range(12):
        routing = router(seen(skewed_TD), Replay())
        adjusted(router, router.statistics())
    counts_E = torch.bincount(routing.expert_TK[routing.valid_TK], minlength=5)
    torch.testing.assert_close(counts_E, torch.full((5,), 1600), rtol=0.01, atol=0)


def test_thresholds_follow_faster_at_first() -> None:
    router = made(ExpertThresholdRouter, decay=0.2)
    router.threshold_E.zero_()
    value = 0.0
    for step in range(30):
        adjusted(router, torch.tensor([1.0] * 6 if step % 2 else [3.0] * 5 + [1.0]))
        decay = min(0.2, (1 + step) / (100 + step))
        value = decay * value + (1 - decay) * (1.0 if step % 2 else 3.0)
        torch.testing.assert_close(router.threshold_E, torch.full((5,), value), rtol=1e-5, atol=1e-6)


def test_a_micro_batch_without_tokens_moves_no_threshold() -> None:
    router = made(ExpertThresholdRouter)
    before = router.threshold_E.clone()
    router(seen(tokens(0)), Replay())
    adjusted(router, router.statistics())
    torch.testing.assert_close(router.threshold_E, before)
    assert router.num_steps.item() == 0


@pytest.mark.parametrize(
    ("kind", "settings", "field"),
    [
        (ExpertChoiceRouter, {"experts_per_token": 0.0}, "router.experts_per_token"),
        (ExpertChoiceRouter, {"experts_per_token": 5.5}, "router.experts_per_token"),
        (SinkhornRouter, {"iterations": 0}, "router.iterations"),
        (ReMoERouter, {"l1_factor": 1.0}, "router.l1_factor"),
        (ReMoERouter, {"l1_start": 2.0}, "router.l1_start"),
        (ReMoERouter, {"l1_max": -1.0}, "router.l1_max"),
        (ExpertThresholdRouter, {"top_k": 5}, "router.top_k"),
        (ExpertThresholdRouter, {"decay": 1.0}, "router.decay"),
    ],
)
def test_what_cannot_work_is_refused(kind: Any, settings: dict[str, Any], field: str) -> None:
    (problem,) = kind.problems(num_experts=5, **complete(kind, **settings))
    assert problem.field == field
    assert kind.problems(num_experts=5, **complete(kind)) == []
