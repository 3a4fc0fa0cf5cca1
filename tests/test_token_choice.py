"""The token-choice router against its formulas, written down token by token in plain Python."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from moetrain.moe.replay import Replay
from moetrain.moe.routers.scoring import best_experts, p_norm, probabilities, scores
from moetrain.moe.routers.token_choice import TokenChoiceRouter
from tests.gating import balance_of
from tests.tiny import complete, seen
from tests.token_choice import NUM_EXPERTS, routed, router


@dataclass(frozen=True)
class Choice:
    """What one token should have got: weights by real expert, best first, and the weight of zero experts."""

    weights: dict[int, float]
    identity: float


SCORES = {
    "sigmoid": lambda logits: [1 / (1 + math.exp(-value)) for value in logits],
    "sqrtsoftplus": lambda logits: [math.sqrt(math.log1p(math.exp(value))) for value in logits],
    "softmax": lambda logits: [math.exp(value) / sum(map(math.exp, logits)) for value in logits],
}


def candidates(ranked: list[float], own: dict[str, Any]) -> list[int]:
    """Experts of the groups that a token keeps."""
    groups, keep = own.get("num_groups", 1), own.get("top_groups", 1)
    size = len(ranked) // groups
    members = [list(range(group * size, (group + 1) * size)) for group in range(groups)]
    best = 1 if own.get("group_score", "max") == "max" else 2
    worth = [sum(sorted((ranked[e] for e in group), reverse=True)[: min(best, size)]) for group in members]
    kept = sorted(range(groups), key=lambda group: (-worth[group], group))[:keep]
    return [expert for group in kept for expert in members[group]]


def by_hand(logits: list[float], bias: list[float], own: dict[str, Any]) -> Choice:
    logits = [value * own.get("logit_scale", 1.0) for value in logits]
    if own.get("logit_softcap"):
        logits = [own["logit_softcap"] * math.tanh(value / own["logit_softcap"]) for value in logits]
    score = SCORES[own.get("score", "softmax")](logits)
    ranked = score if own.get("select", "scores") == "scores" else logits
    ranked = [value + (bias[e] if e < NUM_EXPERTS else 0.0) for e, value in enumerate(ranked)]
    chosen = sorted(candidates(ranked, own), key=lambda e: (-ranked[e], e))[: own.get("top_k", 2)]
    how = own.get("weights", "scores")
    if how == "scores":
        weights = [score[e] for e in chosen]
    else:
        weights = SCORES[how.removeprefix("chosen_")]([logits[e] for e in chosen])
    if own.get("renormalise", "none") != "none":
        p = own.get("renorm_p", 1.0)
        size = sum(weight**p for weight in weights) ** (1 / p) + own.get("renorm_eps", 0.0)
        weights = [weight / max(size, own.get("renorm_min", 0.0)) for weight in weights]
    weights = [weight * own.get("scale", 1.0) for weight in weights]
    pairs = list(zip(chosen, weights, strict=True))
    identity = sum(weight for e, weight in pairs if e >= NUM_EXPERTS)
    return Choice({e: weight for e, weight in pairs if e < NUM_EXPERTS}, identity)


SUM = {"renormalise": "sum"}
GRID: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 1, "score": "sigmoid", "select": "logits", "weight_on": "input"},
    {"top_k": 8, **SUM},
    {"top_k": 3, **SUM, "scale": 2.5},
    {"select": "logits", "weights": "chosen_softmax"},
    {"select": "logits", "weights": "chosen_softmax", "logit_bias": True, "bias": "frozen"},
    {"select": "logits", "weights": "chosen_sigmoid", "bias": "sign", **SUM},
    {"renormalise": "p_norm", "renorm_p": 2.0, "top_k": 4},
    {"renormalise": "p_norm", "renorm_p": 3.0, "renorm_eps": 0.1},
    {**SUM, "renorm_min": 0.9, "bias": "sign"},
    {**SUM, "renorm_eps": 0.5, "score": "sigmoid", "bias": "proportional"},
    {"score": "sqrtsoftplus", **SUM, "scale": 1.5, "bias": "sign", "top_k": 3},
    {"score": "sigmoid", "logit_softcap": 1.5, "logit_scale": 3.0, "bias": "quantile"},
    {"num_groups": 4, "top_groups": 2, "top_k": 3},
    {"num_groups": 4, "top_groups": 2, "top_k": 3, "select": "logits", "bias": "sign"},
    {"num_groups": 4, "top_groups": 2, "group_score": "top2_sum", "score": "sigmoid", **SUM, "bias": "sign"},
    {"num_groups": 2, "top_groups": 1, "group_score": "top2_sum", "score": "sigmoid", "bias": "frozen"},
    {"num_groups": 4, "top_groups": 3, "top_k": 4},
    {"zero_experts": 4, "top_k": 3, "scale": 6.0, "bias": "proportional", "bias_centred": False},
    {"zero_experts": 5, "top_k": 8, **SUM},
    {"zero_experts": 1, "top_k": 1, "score": "sigmoid"},
]


@pytest.mark.parametrize("own", GRID, ids=str)
def test_router_is_the_formula(own: dict[str, Any]) -> None:
    made = router(**own).eval()
    x_TD = torch.randn(24, 6)
    routing = made(seen(x_TD), Replay())
    offset = 0.0 if made.gate_bias is None else made.gate_bias
    logits = (x_TD.double() @ made.gate.double().t() + offset).tolist()
    bias = [0.0] * NUM_EXPERTS if made.bias_E is None else made.bias_E.tolist()
    for token in range(24):
        expected = by_hand(logits[token], bias, own)
        valid = len(expected.weights)
        assert routing.expert_TK[token, :valid].tolist() == list(expected.weights)
        assert routing.weight_TK[token, :valid].tolist() == pytest.approx(list(expected.weights.values()), rel=1e-5)
        assert routing.weight_TK[token, valid:].eq(0).all()
        if routing.valid_TK is None:
            assert valid == routing.expert_TK.shape[1]
        else:
            assert routing.valid_TK[token].tolist() == [choice < valid for choice in range(own["top_k"])]
            assert routing.identity_T is not None
            assert routing.identity_T[token].item() == pytest.approx(expected.identity, rel=1e-5)


@pytest.mark.parametrize("own", GRID, ids=str)
def test_a_routing_is_in_order(own: dict[str, Any]) -> None:
    routing = routed(router(**own))
    zero = own.get("zero_experts", 0)
    assert routing.logits_TE.shape == routing.probs_TE.shape == (24, NUM_EXPERTS)
    torch.testing.assert_close(routing.probs_TE.sum(-1), torch.ones(24))
    assert routing.expert_TK.dtype == torch.int64
    assert all(len(set(row)) == len(row) for row in routing.expert_TK.tolist()), "ids are distinct"
    assert 0 <= int(routing.expert_TK.min()) <= int(routing.expert_TK.max()) < NUM_EXPERTS
    assert routing.weight_on == own.get("weight_on", "output")
    assert (routing.valid_TK is not None) == (routing.identity_T is not None) == (zero > 0)


@pytest.mark.parametrize("own", GRID, ids=str)
def test_trap_t13_gate_gets_a_gradient_and_the_bias_none(own: dict[str, Any]) -> None:
    """Without any balance loss: through the weights alone."""
    made = router(**own)
    routing = routed(made)
    assert not routing.expert_TK.requires_grad
    (routing.weight_TK * torch.randn(routing.weight_TK.shape)).sum().backward()
    assert made.gate.grad is not None
    assert made.gate.grad.abs().max() > 1e-3
    assert made.bias_E is None or not made.bias_E.requires_grad
    assert "bias_E" not in dict(made.named_parameters())


def test_trap9_bias_selects_and_does_not_weigh() -> None:
    made = router(score="sigmoid", bias="frozen", renormalise="sum")
    made.bias_E.copy_(torch.tensor([9.0, 8.0, 0, 0, 0, 0, 0, 0]))
    routing = routed(made)
    assert routing.expert_TK.tolist() == [[0, 1]] * 24
    own_TK = routing.logits_TE[:, :2].sigmoid()
    torch.testing.assert_close(routing.weight_TK, own_TK / own_TK.sum(-1, keepdim=True))


@pytest.mark.parametrize("select", ["scores", "logits"])
@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
def test_trap12_t14_no_pick_outside_of_the_best_groups(select: str, group_score: str) -> None:
    """With a bias that makes every score negative, a mask of 0 would prefer what it forbids."""
    own = {"num_groups": 4, "top_groups": 2, "top_k": 4, "score": "sigmoid", "select": select}
    made = router(bias="frozen", group_score=group_score, **own)
    made.bias_E.fill_(-20.0)
    routing = routed(made, 200)
    value_TE = routing.logits_TE.sigmoid() if select == "scores" else routing.logits_TE
    grouped_TGe = value_TE.view(200, 4, 2)
    worth_TG = grouped_TGe.amax(-1) if group_score == "max" else grouped_TGe.sum(-1)
    allowed_TG = worth_TG.topk(2).indices
    assert (routing.expert_TK // 2).sort(-1).values.equal(allowed_TG.repeat_interleave(2, 1).sort(-1).values)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_probabilities_beside_zero_experts_are_those_of_the_real_ones(score: Any) -> None:
    """LongCat: even logits are an even load, whose balance loss is 1.0 and whose entropy is ln E, not less."""
    made = router(score=score, zero_experts=4, top_k=3)
    routing = routed(made)
    worth_TE = routing.logits_TE.exp() if score == "softmax" else scores(routing.logits_TE, score)
    torch.testing.assert_close(routing.probs_TE, worth_TE / worth_TE.sum(-1, keepdim=True))
    torch.nn.init.zeros_(made.gate)
    even = routed(made)
    assert balance_of(even).balance.item() == pytest.approx(1.0)
    assert torch.special.entr(even.probs_TE).sum(-1).mean().item() == pytest.approx(math.log(NUM_EXPERTS))


def test_a_softmax_that_zero_experts_have_taken_whole_still_has_probabilities() -> None:
    made = router(zero_experts=1, top_k=2)
    with torch.no_grad():
        made.gate[:-1].mul_(0.01)
        made.gate[-1] = torch.full((6,), 500.0)
    routing = made(seen(torch.ones(4, 6)), Replay())
    assert torch.equal(routing.identity_T, torch.ones(4))
    torch.testing.assert_close(routing.probs_TE.sum(-1), torch.ones(4))


def test_a_softmax_is_not_divided_by_its_sum() -> None:
    score_TE = scores(torch.randn(64, 7), "softmax")
    assert torch.equal(probabilities(score_TE, "softmax"), score_TE)
    assert not torch.equal(score_TE / score_TE.sum(-1, keepdim=True), score_TE)


def test_sqrtsoftplus_has_a_gradient_where_softplus_underflows() -> None:
    logits_TE = torch.tensor([[-200.0, -90.0, 0.0, 50.0]], requires_grad=True)
    scores(logits_TE, "sqrtsoftplus").sum().backward()
    assert logits_TE.grad is not None
    assert logits_TE.grad.isfinite().all()
    assert logits_TE.grad[0, 2].item() == pytest.approx(0.5 / (2 * math.sqrt(math.log(2))))


@pytest.mark.parametrize("p", [0.5, 2.0, 3.0])
def test_a_p_norm_is_that_of_torch_in_value_and_gradient(p: float) -> None:
    ours_TK = torch.rand(7, 3, dtype=torch.float64).add(0.1).requires_grad_()
    theirs_TK = ours_TK.detach().clone().requires_grad_()
    for given_TK, norm_T1 in ((ours_TK, p_norm(ours_TK, p)), (theirs_TK, theirs_TK.norm(p, dim=-1, keepdim=True))):
        (given_TK / norm_T1).square().sum().backward()
    torch.testing.assert_close(p_norm(ours_TK, p), theirs_TK.norm(p, dim=-1, keepdim=True))
    torch.testing.assert_close(ours_TK.grad, theirs_TK.grad)


def test_a_large_p_leaves_finite_weights_and_gradients() -> None:
    weight_TK = torch.tensor([[0.4, 0.2], [0.0, 0.0]], requires_grad=True)
    norm_T1 = p_norm(weight_TK, 1e9)
    assert norm_T1.tolist() == [[pytest.approx(0.4)], [pytest.approx(0.0)]]
    (weight_TK[:1] / norm_T1[:1]).sum().backward()
    assert weight_TK.grad is not None
    assert weight_TK.grad.isfinite().all()


@pytest.mark.parametrize("top_k", [1, 3, 7])
def test_the_best_are_those_of_a_stable_sort(top_k: int) -> None:
    """Also among ties, and where fewer than k are above minus infinity: nothing is chosen twice."""
    generator = torch.Generator().manual_seed(top_k)
    score_TE = torch.randint(-3, 3, (50, 7), generator=generator).float()
    score_TE[torch.rand(50, 7, generator=generator) < 0.4] = -torch.inf
    score_TE[0] = -torch.inf
    order_TE = score_TE.sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(best_experts(score_TE, top_k), order_TE[:, :top_k])


def test_ties_go_to_the_lower_expert() -> None:
    made = router(top_k=3, num_groups=4, top_groups=2)
    torch.nn.init.zeros_(made.gate)
    assert routed(made, 4).expert_TK.tolist() == [[0, 1, 2]] * 4


@pytest.mark.parametrize("own", [{"renormalise": "sum"}, {}, {"scale": 3.0}], ids=str)
def test_gshards_second_is_used_by_its_weight_and_keeps_its_place(own: dict[str, Any]) -> None:
    made = router(second="random", **own)
    drawn = routed(made, 20_000)
    always = routed(made.eval(), 20_000)
    assert torch.equal(drawn.expert_TK, always.expert_TK)
    assert drawn.valid_TK is None, "an unused second is counted and served all the same"
    used_T = drawn.weight_TK[:, 1] > 0
    assert torch.equal(drawn.weight_TK[used_T], always.weight_TK[used_T])
    assert torch.equal(drawn.weight_TK[:, 0], always.weight_TK[:, 0])
    chance_T = 2 * always.weight_TK[:, 1] / always.weight_TK.sum(-1)
    for low in (0.0, 0.25, 0.5, 0.75):
        among_T = (chance_T >= low) & (chance_T < low + 0.25)
        assert used_T[among_T].float().mean().item() == pytest.approx(chance_T[among_T].mean().item(), abs=0.03)


@pytest.mark.parametrize(
    "own",
    [
        {"noise": "gaussian", "noise_scale": 5.0},
        {"second": "random"},
        {"noise": "gaussian", "noise_scale": 5.0, "zero_experts": 4, "top_k": 3},
    ],
    ids=str,
)
def test_recompute_decides_as_before(own: dict[str, Any]) -> None:
    made, replay, x_TD = router(**own), Replay(), torch.randn(64, 6)
    first, again, other = (made(seen(x_TD), given) for given in (replay, replay, Replay()))
    assert torch.equal(first.expert_TK, again.expert_TK)
    assert torch.equal(first.weight_TK == 0, again.weight_TK == 0)
    if first.valid_TK is not None:
        assert torch.equal(first.valid_TK, again.valid_TK)
    same = torch.equal(first.expert_TK, other.expert_TK) and torch.equal(first.weight_TK, other.weight_TK)
    assert not same


def test_trap10_logits_and_choice_are_fp32_under_a_bf16_gate() -> None:
    made = router(bias="frozen", logit_bias=True, noise="learned").to(torch.bfloat16)
    routing = made(seen(torch.randn(4, 6, dtype=torch.bfloat16)), Replay())
    assert routing.logits_TE.dtype == routing.weight_TK.dtype == routing.probs_TE.dtype == torch.float32


def test_traits() -> None:
    plain = TokenChoiceRouter.traits(num_experts=8, **complete(TokenChoiceRouter))
    assert (plain.experts_per_token, plain.ragged, plain.noise, plain.balance) == (2, False, "none", "none")
    own = complete(TokenChoiceRouter, top_k=3, zero_experts=4, bias="sign", second="random")
    longcat = TokenChoiceRouter.traits(num_experts=8, **own)
    assert longcat.experts_per_token == pytest.approx(2)
    assert (longcat.ragged, longcat.noise, longcat.balance) == (True, "random second", "sign bias")


UNSOUND = [
    ({"top_k": 1, "weights": "chosen_softmax"}, "weights", "no gradient"),
    ({"weights": "chosen_softmax", "score": "sigmoid"}, "weights", "balance loss"),
    ({"weights": "chosen_sigmoid", "score": "sqrtsoftplus"}, "weights", "sqrtsoftplus"),
    ({"top_k": 1, "renormalise": "sum"}, "renormalise", "no gradient"),
    ({"weights": "chosen_softmax", "renormalise": "sum"}, "renormalise", "already"),
    ({"second": "random", "top_k": 3}, "second", "not of 3"),
    ({"renorm_eps": 0.1}, "renorm_eps", "no part"),
    ({"renorm_min": -0.1, "renormalise": "sum"}, "renorm_min", "negative"),
    ({"renorm_p": 2.0, "renormalise": "sum"}, "renorm_p", "no part"),
    ({"renorm_p": 0.0, "renormalise": "p_norm"}, "renorm_p", "greater than 0"),
    ({"scale": 0.0}, "scale", "greater than 0"),
    ({"logit_softcap": -1.0}, "logit_softcap", "greater than 0"),
    ({"num_groups": 3}, "num_groups", "equal groups"),
    ({"num_groups": 4, "top_groups": 5}, "top_groups", "at most all"),
    ({"num_groups": 4, "top_groups": 1, "top_k": 3}, "top_groups", "2 experts are left"),
    ({"num_groups": 8, "top_groups": 4, "group_score": "top2_sum"}, "group_score", "two experts"),
    ({"num_groups": 8, "top_groups": 3, "top_k": 3}, "top_groups", "limits nothing"),
    ({"bias": "sign", "bias_rate": 0.0}, "bias_rate", "greater than 0"),
    ({"bias": "quantile", "bias_rate": 1.5}, "bias_rate", "at most 1"),
    ({"bias": "quantile", "top_k": 8}, "bias", "all 8 are chosen"),
    ({"bias": "quantile", "num_groups": 4, "top_groups": 1}, "bias", "groups"),
    ({"bias": "quantile", "zero_experts": 2}, "bias", "zero experts"),
    ({"zero_experts": -1}, "zero_experts", "number"),
    ({"zero_experts": 2, "weight_on": "input"}, "weight_on", "no input"),
    ({"zero_experts": 2, "num_groups": 4, "top_groups": 1}, "num_groups", "no group"),
    ({"zero_experts": 2, "bias": "sign"}, "bias_centred", "share"),
    ({"noise": "jitter", "noise_scale": 1.5}, "noise_scale", "at most 1"),
    ({"noise": "gaussian", "noise_scale": -1.0}, "noise_scale", "must be 0 or more"),
    ({"noise_scale": 0.1}, "noise_scale", "no part in router.noise=none"),
    ({"noise": "learned", "noise_scale": 0.1}, "noise_scale", "no part in router.noise=learned"),
    ({"bias_rate": 0.1}, "bias_rate", "no part in router.bias=none"),
    ({"bias": "frozen", "bias_centred": False}, "bias_centred", "no part in router.bias=frozen"),
    ({"group_score": "top2_sum"}, "group_score", "no part"),
    ({"num_groups": 4, "top_groups": 2}, "top_groups", "limits nothing"),
    ({"top_groups": 2}, "top_groups", "router.num_groups = 1"),
    ({"noise": "warmup"}, "noise_steps", "optimiser steps"),
    ({"noise": "gumbel", "noise_steps": 3}, "noise_steps", "no part"),
]


@pytest.mark.parametrize(("own", "field", "reason"), UNSOUND, ids=str)
def test_unsound_settings_are_refused_with_a_fix(own: dict[str, Any], field: str, reason: str) -> None:
    (problem,) = TokenChoiceRouter.problems(num_experts=NUM_EXPERTS, **complete(TokenChoiceRouter, **own))
    assert problem.field == f"router.{field}"
    assert problem.value == own.get(field, True if field == "bias_centred" else problem.value)
    assert reason in problem.reason
    assert "router." in problem.fix
