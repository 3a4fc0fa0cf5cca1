"""Parity with the MoE blocks of the pinned transformers: every case, its record, and that the comparison has teeth."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from moetrain.compose import compose
from moetrain.config import Part
from moetrain.moe.replay import Replay
from moetrain.moe.routers import scoring
from moetrain.parity.block import TRANSFORMERS, build_block, tensors_of, transformers_version
from moetrain.parity.case import DIM, GRADIENT_BOUND, OUTPUT_BOUND, WIDTH, Case
from moetrain.parity.cases import CASES
from moetrain.parity.layouts import Layout, listed, transposed_biased
from moetrain.parity.measure import alone, candidate, config_of, data, measure, measure_one, reference, set_weights
from moetrain.parity.record import read_record, write_record
from moetrain.types import ConfigError, LossTerms, RouterInput

BY_NAME = {case.name: case for case in CASES}
MISS = 1e-3
PLAIN = {"renormalise": "none", "renorm_eps": 0.0}


@cache
def router_part(name: str) -> Part:
    """The router section as the command line composes it."""
    return compose([f"router={name}", "dispatch=local", "capacity=dropless", "engine=local"], 1).router


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_output_and_gradients_are_those_of_the_block(case: Case) -> None:
    measured = measure_one(case, router_part)
    assert measured.output_error < OUTPUT_BOUND
    assert measured.gradient_error < GRADIENT_BOUND
    assert 0.1 < measured.output_rms < 3.0


def test_there_are_enough_cases() -> None:
    assert len(BY_NAME) == len(CASES) >= 100
    assert len({case.path for case in CASES}) >= 60
    assert all(bool(case.around) == (case.finish is not None) for case in CASES)


def test_the_record_is_of_these_cases_and_within_the_bounds() -> None:
    record = read_record()
    assert record.transformers == TRANSFORMERS
    assert [(m.name, m.block, m.router) for m in record.cases] == [(c.name, c.path, c.router) for c in CASES]
    assert all(m.output_error < OUTPUT_BOUND and m.gradient_error < GRADIENT_BOUND for m in record.cases)


def test_a_record_is_read_as_it_was_written(tmp_path) -> None:
    measured = measure(CASES[:2], router_part)
    write_record(measured, tmp_path / "measured.json")
    record = read_record(tmp_path / "measured.json")
    assert (record.torch, record.transformers) == (torch.__version__, transformers_version())
    assert [m.name for m in record.cases] == [case.name for case in CASES[:2]]
    assert record.cases[0].output_error == pytest.approx(measured[0].output_error, rel=0.05)


def test_without_transformers_there_is_one_plain_problem(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.models.mixtral.configuration_mixtral", None)
    with pytest.raises(ConfigError, match=r"need the package transformers.*pip install"):
        build_block(BY_NAME["mixtral"])


WRONG_ROUTERS = (
    ("mixtral", {"renormalise": "none"}),
    ("mixtral", {"top_k": 3}),
    ("mixtral", {"renormalise": "none", "weights": "chosen_sigmoid"}),
    ("olmoe-raw", {"renormalise": "sum"}),
    ("dbrx-norm2", {"renorm_p": 1.0}),
    ("dbrx-norm1", {"renorm_p": 2.0}),
    ("deepseek_v2-groups", {"group_score": "top2_sum"}),
    ("deepseek_v2-groups", {"num_groups": 1, "top_groups": 1}),
    ("mistral4-groups", {"group_score": "max"}),
    ("deepseek_v3", PLAIN),
    ("deepseek_v3", {"scale": 1.0}),
    ("deepseek_v3", {"score": "softmax"}),
    ("deepseek_v3", {"group_score": "max"}),
    ("deepseek_v3", {"top_groups": 3}),
    ("deepseek_v3", {"renormalise": "p_norm", "renorm_p": 2.0}),
    ("deepseek_v4", {"score": "sigmoid"}),
    ("deepseek_v4-hash", {"weights": "softmax"}),
    ("kolibri1-raw", {"select": "scores"}),
    ("kolibri1-raw", {"renormalise": "sum"}),
    ("laguna-softcap", {"logit_softcap": None}),
    ("gpt_oss", {"weights": "scores"}),
    ("llama4-k2", {"weight_on": "output"}),
    ("llama4-k2", {"score": "softmax"}),
    ("longcat_flash", {"renormalise": "sum"}),
    ("phimoe-eps0.4", {"epsilon": 0.01}),
)


@pytest.mark.parametrize(("name", "wrong"), WRONG_ROUTERS, ids=lambda part: str(part))
def test_a_wrong_router_misses(name: str, wrong: dict) -> None:
    case = BY_NAME[name]
    assert measure_one(replace(case, overrides={**case.overrides, **wrong}), router_part).output_error > MISS


BIASED = [case for case in CASES if case.layout.bias is not None]


@pytest.mark.parametrize("case", BIASED, ids=lambda case: case.name)
def test_a_forgotten_bias_misses(case: Case) -> None:
    forgotten = replace(case, layout=replace(case.layout, bias=None))
    assert measure_one(forgotten, router_part).output_error > MISS


def test_half_of_the_gradient_misses_though_the_output_is_right(monkeypatch) -> None:
    whole = scoring.combine_weights
    monkeypatch.setattr(scoring, "combine_weights", lambda *given: whole(*given).detach().lerp(whole(*given), 0.5))
    measured = measure_one(BY_NAME["olmoe-raw"], router_part)
    assert measured.output_error < OUTPUT_BOUND
    assert measured.gradient_error > MISS


@pytest.mark.parametrize(
    ("name", "experts"),
    [
        ("gpt_oss", {"activation_limit": None}),
        ("deepseek_v4", {"activation_limit": None}),
        ("cohere2_moe-sigmoid-average", {"shared_mode": "add"}),
    ],
)
def test_wrong_experts_miss(name: str, experts: dict) -> None:
    case = BY_NAME[name]
    assert measure_one(replace(case, experts={**case.experts, **experts}), router_part).output_error > MISS


def test_gates_and_ups_in_the_wrong_order_miss() -> None:
    case = BY_NAME["gpt_oss"]
    halves = replace(case, layout=replace(case.layout, experts=transposed_biased))
    assert measure_one(halves, router_part).output_error > MISS


def test_a_capacity_that_was_left_out_misses() -> None:
    assert measure_one(replace(BY_NAME["switch-dropping"], capacity={}), router_part).output_error > MISS


def _groups_of(expert_TK: Tensor) -> list[int]:
    """How many of the four groups of four experts each token's choice touches."""
    return [len(set(row)) for row in (expert_TK // 4).tolist()]


def _choice(case: Case, block: torch.nn.Module) -> Tensor:
    layer = alone(config_of(case, router_part(case.router)))
    theirs, given = tensors_of(block), data()
    set_weights(layer, {**case.layout.parameters(theirs), **case.layout.buffers(theirs)})
    return layer.router(RouterInput(given.x_TD, given.tokens_BS), Replay()).expert_TK


def test_defect_masking_groups_with_zero_lets_their_experts_in_where_biased_scores_are_negative() -> None:
    """AXK2 masks with 0.0, DeepSeek-V3 with -inf: with a bias of -3 on all, AXK2 takes experts of refused groups."""
    right = BY_NAME["deepseek_v3-groups"]
    wrong = replace(right, model="axk2", block="AXK2MoE", config="AXK2Config")
    with_zero, with_inf = build_block(wrong), build_block(right)
    tensors_of(with_zero)["gate.e_score_correction_bias"] -= 3.0
    with_inf.load_state_dict(with_zero.state_dict())
    ours = candidate(right, config_of(right, router_part(right.router)), with_inf)
    assert (ours.out_TD - reference(right, with_inf).out_TD).abs().max() < OUTPUT_BOUND
    assert (ours.out_TD - reference(wrong, with_zero).out_TD).abs().max() > MISS
    refused = with_zero.gate(data().x_TD)[2].unsqueeze(2) // 4 != _choice(right, with_inf).unsqueeze(1) // 4
    assert refused.all(), "no group that theirs took an expert of is one that ours did"


def test_defect_masking_groups_with_zero_counts_experts_that_were_not_allowed_where_softmax_underflows() -> None:
    """DeepSeek-V2: the weight of such a choice is 0, so the output is right and the load is wrong."""
    case = BY_NAME["deepseek_v2-groups"]
    block = build_block(case)
    tensors_of(block)["gate.weight"] *= 300.0
    assert max(_groups_of(block.gate(data().x_TD)[2])) > 2
    assert max(_groups_of(_choice(case, block))) == 2
    ours = candidate(case, config_of(case, router_part(case.router)), block)
    assert (ours.out_TD - reference(case, block).out_TD).abs().max() < OUTPUT_BOUND


def test_defect_jitter_in_place_reaches_the_experts_and_the_caller() -> None:
    case = BY_NAME["mixtral"]
    noisy = replace(case, overrides={"noise": "jitter", "noise_scale": 0.3})
    block = build_block(replace(case, arguments={**case.arguments, "router_jitter_noise": 0.3})).train()
    layer = alone(config_of(noisy, router_part("mixtral")))
    set_weights(layer, case.layout.parameters(tensors_of(block)))
    given = data()
    x_TD = given.x_TD.clone()
    block(x_TD.view(2, -1, DIM))
    assert (x_TD - given.x_TD).abs().max() > 0.1
    x_TD = given.x_TD.clone()
    jittered, calm = (layer.train(mode)(x_TD, given.tokens_BS, Replay()).hidden_TD for mode in (True, False))
    assert torch.equal(x_TD, given.x_TD)
    assert (jittered - calm).abs().max() > MISS
    torch.testing.assert_close(calm, reference(case, block.eval()).out_TD)


def test_defect_a_loss_over_layers_end_to_end_hides_that_every_layer_collapsed() -> None:
    """Layer l sends all to experts 2l and 2l+1: transformers says 2.0, which is its value for an even load."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config, given = config_of(BY_NAME["mixtral"], router_part("mixtral")), data()
    given.x_TD[:, 0] = 1.0
    logits, losses = [], []
    for pair in range(4):
        layer = alone(config)
        with torch.no_grad():
            for weight in layer.parameters():
                weight.zero_()
            layer.router.gate[2 * pair : 2 * pair + 2, 0] = 30.0
        losses.append(layer(given.x_TD, given.tokens_BS, Replay()).losses.detach())
        logits.append(layer.router(RouterInput(given.x_TD, given.tokens_BS), Replay()).logits_TE.detach())
    assert float(load_balancing_loss_func(tuple(logits), 8, 2)) == pytest.approx(2.0)
    assert float(LossTerms.mean(losses).balance) == pytest.approx(4.0)


def test_defect_the_sparse_block_of_nllb_runs_two_experts_whatever_the_router_says() -> None:
    """Ours is what its router and its experts give when every expert gets the tokens that chose it."""
    case = Case(
        "nllb",
        "nllb_moe",
        "NllbMoeSparseMLP",
        "NllbMoeConfig",
        {"d_model": DIM, "num_experts": 8, "moe_token_dropout": 0.0},
        "mixtral",
        Layout(listed("fc1", "fc2", biased=True), gate="router.classifier.weight"),
        experts={"activation": "relu", "bias": True},
        block_arguments={"ffn_dim": WIDTH},
    )
    block, x_TD = build_block(case), data().x_TD
    gates_TE = block.router(x_TD)[1]
    assert (gates_TE > 0).any(0).all()
    formula_TD = sum(gates_TE[:, [e]] * block.experts[f"expert_{e}"](x_TD) for e in range(8))
    ours = candidate(case, config_of(case, router_part("mixtral")), block)
    assert (ours.out_TD - formula_TD).abs().max() < OUTPUT_BOUND
    before = reference(case, block).out_TD
    for e in range(2, 8):
        tensors_of(block)[f"experts.expert_{e}.fc2.weight"].zero_()
    assert torch.equal(reference(case, block).out_TD, before)
