"""What a router learns outside of the gradient: the bias that selects, its steps, and the state around it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from moetrain.moe.adapt import adapt
from moetrain.moe.replay import Replay
from moetrain.moe.routers.selection_bias import quantile_of
from moetrain.moe.routers.token_choice import TokenChoiceRouter
from tests.tiny import alone, ids, moe_layer, seen, site, tiny
from tests.token_choice import COUNTS, NUM_EXPERTS, routed, router, step

TARGET = "moetrain.moe.routers.token_choice.TokenChoiceRouter"
NOTHING = torch.zeros(0, dtype=torch.float64)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("bias", ["sign", "proportional"])
def test_a_step_of_the_bias_is_its_equation(bias: str, centred: bool) -> None:
    made = router(bias=bias, bias_rate=0.1, bias_centred=centred)
    before = made.bias_E.clone()
    kept = made.bias_E
    step(made, COUNTS, NOTHING)
    lack = [4.0 - count for count in COUNTS.tolist()]
    moves = [math.copysign(1, value) if value else 0.0 for value in lack] if bias == "sign" else [v / 4 for v in lack]
    mean = sum(moves) / 8 if centred else 0.0
    expected = torch.tensor([0.1 * (move - mean) for move in moves])
    torch.testing.assert_close(made.bias_E - before, expected)
    assert made.bias_E is kept, "in place"
    if centred:
        assert (made.bias_E - before).sum().abs() < 1e-6


@pytest.mark.parametrize("bias", ["none", "frozen"])
def test_no_bias_or_a_frozen_one_does_not_adapt(bias: str) -> None:
    assert not router(bias=bias).adapts


def test_the_bias_beside_zero_experts_aims_at_the_even_share_of_all() -> None:
    """LongCat-Flash's ``mu (K_e / (K N) - c / (K T))``, with K_e = 2 real experts of K = 3 choices, N = 8 and Z = 4."""
    mu = 1.2
    made = router(bias="proportional", bias_rate=mu / (8 + 4), bias_centred=False, zero_experts=4, top_k=3)
    routed(made, 16)
    statistics_S = made.statistics()
    before = made.bias_E.clone()
    step(made, COUNTS, statistics_S)
    expected = [mu * (2 / (3 * 8) - count / (3 * 16)) for count in COUNTS.tolist()]
    torch.testing.assert_close(made.bias_E - before, torch.tensor(expected))


def test_quantile_gives_every_expert_its_even_share() -> None:
    """kT/E tokens lie above it in each column, but for those that left just this expert and so lie on it."""
    torch.manual_seed(0)
    selection_TE = torch.randn(64, 8) + torch.linspace(-1, 1, 8)
    bias_E = torch.randn(8) * 0.1
    biased_TE = selection_TE + bias_E
    quantile_E = quantile_of(selection_TE, biased_TE, 2)
    third_T1 = biased_TE.sort(-1, descending=True).values[:, 2:3]
    margin_TE = selection_TE - third_T1 + quantile_E
    assert ((margin_TE > 1e-6).sum(0) <= 64 * 2 // 8).all()
    assert ((margin_TE > -1e-6).sum(0) > 64 * 2 // 8).all()
    assert ((margin_TE > 1e-6).sum(0) == 64 * 2 // 8).sum() >= 5


def test_a_step_to_the_quantile_is_a_centred_running_mean_over_micro_batches() -> None:
    made = router(bias="quantile", bias_rate=0.25, select="logits")
    before = made.bias_E.clone()
    total_S = torch.zeros(NUM_EXPERTS, dtype=torch.float64)
    for seed in (1, 2):
        logits_TE = routed(made, 32, seed).logits_TE
        expected_E = quantile_of(logits_TE, logits_TE + before, 2)
        statistics_S = made.statistics()
        torch.testing.assert_close(statistics_S.float(), expected_E)
        total_S += statistics_S
    step(made, COUNTS, total_S, num=2)
    mean_E = total_S.float() / 2
    torch.testing.assert_close(made.bias_E, 0.75 * before + 0.25 * (mean_E - mean_E.mean()))


def max_violation(counts_E: torch.Tensor) -> float:
    mean = counts_E.double().mean()
    return float((counts_E.max() - mean) / mean)


SIMULATED = [
    ({"bias": "sign", "bias_rate": 0.02, "score": "sigmoid"}, 60),
    ({"bias": "sign", "bias_rate": 0.02, "score": "sigmoid", "bias_centred": False}, 60),
    ({"bias": "proportional", "bias_rate": 0.05, "score": "sigmoid"}, 60),
    ({"bias": "quantile", "bias_rate": 0.2, "select": "logits", "weights": "chosen_softmax"}, 25),
    ({"bias": "proportional", "bias_rate": 0.05, "bias_centred": False, "zero_experts": 4, "score": "sigmoid"}, 60),
]


@pytest.mark.parametrize(("own", "steps"), SIMULATED, ids=str)
def test_the_load_evens_out(own: dict[str, Any], steps: int) -> None:
    made = router(logit_bias=True, **own)
    made.bias_E.zero_()
    assert made.gate_bias is not None
    with torch.no_grad():
        made.gate_bias.copy_(torch.linspace(-2, 2, made.gate.shape[0]))
    violations = []
    for seed in range(steps + 1):
        routing = routed(made, 512, seed)
        taken = routing.expert_TK if routing.valid_TK is None else routing.expert_TK[routing.valid_TK]
        counts_E = torch.zeros(NUM_EXPERTS, dtype=torch.int64).index_add(
            0, taken.flatten(), torch.ones_like(taken.flatten())
        )
        violations.append(max_violation(counts_E))
        step(made, counts_E, made.statistics())
    assert violations[0] > 0.8
    assert sum(violations[-5:]) / 5 < 0.25
    if own.get("zero_experts"):
        assert int(counts_E.sum()) == pytest.approx(512 * 2 * 8 / 12, rel=0.1), "real experts take their share"


def test_trap_t9_the_bias_moves_by_what_was_assigned_before_dropping() -> None:
    """Counts after capacity saturate: a bias moved by them would see an even load and stay."""
    part = {"_target_": TARGET, "bias": "sign", "bias_rate": 0.5, "bias_centred": False, "score": "sigmoid"}
    config = tiny(capacity__factor_train=0.25, capacity__minimum=1, router___target_=TARGET)
    config.router.update(part)
    layer = moe_layer(config)
    x_TD = torch.randn(32, 16)
    for _ in range(2):
        layer(x_TD, ids(x_TD), Replay())
        layer.commit()
    assigned_E, kept_E = layer.load.pending_2E
    assert assigned_E.dtype == torch.int64
    assert assigned_E.sum() == 2 * 64 > kept_E.sum()
    before = layer.router.bias_E.clone()
    adapt([layer.router], [layer.load], [layer.observed], alone(), moved=True)
    expected = 0.5 * (assigned_E.double().mean() - assigned_E.double()).sign().float()
    torch.testing.assert_close(layer.router.bias_E - before, expected)
    assert not expected.equal(0.5 * (kept_E.double().mean() - kept_E.double()).sign().float())


ADAPTIVE: list[dict[str, Any]] = [
    {"bias": "sign"},
    {"bias": "quantile", "noise": "warmup", "noise_steps": 4},
    {"bias": "proportional", "bias_centred": False, "zero_experts": 2, "noise": "warmup", "noise_steps": 4},
]


@pytest.mark.parametrize("own", ADAPTIVE, ids=str)
def test_forward_changes_no_state_and_adjust_does(own: dict[str, Any]) -> None:
    made = router(**own)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    routed(made, seed=1)
    torch.manual_seed(4)
    routed(made, seed=2)
    assert all(torch.equal(before[name], value) for name, value in made.state_dict().items())
    latest_S = made.statistics()
    torch.manual_seed(4)
    routed(made, seed=2)
    assert torch.equal(made.statistics(), latest_S), "of the latest forward alone"
    assert made.statistics().numel() == 0, "taken once"
    made.eval()
    routed(made)
    assert made.statistics().numel() == 0, "evaluation says nothing"
    step(made, COUNTS, latest_S)
    changed = {name for name, value in made.state_dict().items() if not torch.equal(before[name], value)}
    assert changed == set(before) - {"gate"}


@pytest.mark.parametrize("own", ADAPTIVE, ids=str)
def test_state_survives_a_checkpoint(own: dict[str, Any]) -> None:
    made = router(**own)
    routed(made)
    step(made, COUNTS, made.statistics())
    state = made.state_dict()
    assert all(value.dtype == torch.float32 for value in state.values())
    again = TokenChoiceRouter(site=site(6, NUM_EXPERTS), **own)
    again.load_state_dict(state)
    assert torch.equal(routed(again.eval()).expert_TK, routed(made.eval()).expert_TK)
    for name, value in again.state_dict().items():
        assert torch.equal(value, state[name])


def test_a_rank_without_tokens_says_nothing() -> None:
    made = router(bias="quantile", noise="warmup", noise_steps=4)
    made(seen(torch.zeros(0, 6)), Replay())
    statistics_S = made.statistics()
    assert statistics_S[:3].eq(0).all()
    torch.testing.assert_close(statistics_S[3:].float(), made.bias_E)
