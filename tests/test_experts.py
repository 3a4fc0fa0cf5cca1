"""Experts of every activation, with biases and shared experts, against plain loops; their counts and their decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain.config import ExpertsConfig
from moetrain.engine.base import parameter_groups
from moetrain.models.counts import size_report
from moetrain.models.decoder import Decoder
from moetrain.moe.experts import Experts
from moetrain.moe.replay import Replay
from moetrain.ops.init import Draw
from moetrain.ops.kernels import make_kernels
from moetrain.rules.shapes import gate_to_limit, shared_to_join
from tests.arrived import arrived
from tests.tiny import VOCAB, alone, ids, moe_layer, tiny

CPU = torch.device("cpu")
DIM, WIDTH, NUM = 8, 16, 4


def silu(gate: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate)


def clamped(gate: Tensor, up: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
    return (gate, up) if limit is None else (torch.clamp(gate, max=limit), torch.clamp(up, min=-limit, max=limit))


def gelu(gate: Tensor) -> Tensor:
    return 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))


GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "swiglu": lambda gate, up: silu(gate) * up,
    "geglu": lambda gate, up: gelu(gate) * up,
    "gpt_oss": lambda gate, up: (up + 1) * gate * torch.sigmoid(1.702 * gate),
}


def plain(config: ExpertsConfig, experts: Experts, e: int, x_RD: Tensor) -> Tensor:
    """Expert e by its formula."""
    named = dict(experts.named_parameters())
    first = named.get("gate_up", named.get("up"))
    assert first is not None
    hidden = x_RD @ first[e].t()
    if config.bias:
        hidden = hidden + named.get("gate_up_bias", named.get("up_bias"))[e]  # type: ignore[index]
    if config.activation in GATED:
        hidden = GATED[config.activation](*clamped(hidden[:, :WIDTH], hidden[:, WIDTH:], config.activation_limit))
    else:
        hidden = hidden.clamp(min=0) ** (2 if config.activation == "relu2" else 1)
    return hidden @ named["down"][e].t() + (named["down_bias"][e] if config.bias else 0)


CASES: list[dict[str, Any]] = [
    {"activation": name, "bias": bias} for name in ("swiglu", "geglu", "gpt_oss", "relu", "relu2") for bias in (0, 1)
]
CASES += [{"activation": name, "activation_limit": 0.5} for name in ("swiglu", "gpt_oss")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(v) for v in case.values()))
@pytest.mark.parametrize("sizes", [[3, 0, 5, 2], [0, 0, 0, 0], [4, 4, 4, 4]])
def test_experts_equal_their_formula_in_value_and_gradient(case: dict[str, Any], sizes: list[int]) -> None:
    config = ExpertsConfig(num_experts=NUM, **{**case, "bias": bool(case.get("bias"))})
    experts = Experts(config, DIM, WIDTH, NUM, 0, CPU, make_kernels(CPU, "torch"))
    experts.init_weights(Draw(1), 0.5, 0.5)
    torch.manual_seed(0)
    for name, parameter in experts.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter)
    x_RD = torch.randn(sum(sizes), DIM, requires_grad=True)
    wanted = torch.cat([plain(config, experts, e, part) for e, part in enumerate(x_RD.split(sizes))])
    inputs = [x_RD, *experts.parameters()]
    probe = torch.linspace(-1, 1, DIM)
    reference = torch.autograd.grad((wanted * probe).sum(), inputs)
    out = experts(arrived(x_RD, sizes))
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad((out * probe).sum(), inputs)
    for mine, theirs in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    for e in (e for e, size in enumerate(sizes) if not size):
        assert all(bool((gradient[e] == 0).all()) for gradient in ours[1:])


@pytest.mark.parametrize("dispatch", ["local", "padded"])
def test_the_combine_weight_multiplies_the_bias_and_empty_slots_give_it_no_gradient(dispatch: str) -> None:
    config = tiny(dispatch=dispatch, experts__bias=True, capacity__factor_train=4.0, capacity__factor_eval=4.0)
    layer = moe_layer(config)
    torch.nn.init.zeros_(layer.experts.down)
    torch.nn.init.ones_(layer.experts.down_bias)
    x_TD = torch.randn(24, 16)
    out = layer(x_TD, ids(x_TD, 2), Replay()).hidden_TD
    torch.testing.assert_close(out, torch.ones(24, 16), msg="weights sum to 1, and every expert gives 1")
    out.sum().backward()
    assert layer.experts.down_bias.grad is not None
    assert layer.experts.down_bias.grad.sum().item() == pytest.approx(24 * 16, rel=1e-5)


@pytest.mark.parametrize("mode", ["add", "gated", "average"])
def test_shared_experts_join_as_published(mode: str) -> None:
    config = tiny(dispatch="local", experts__num_shared=2, experts__shared_mode=mode)
    layer, x_TD = moe_layer(config), torch.randn(24, 16)
    joined = layer(x_TD, ids(x_TD, 2), Replay()).hidden_TD
    shared = layer.shared
    assert shared is not None
    gate, up = (x_TD @ shared.gate_up.t()).chunk(2, dim=-1)
    own = (silu(gate) * up) @ shared.down.t()
    layer.shared = None
    routed = layer(x_TD, ids(x_TD, 2), Replay()).hidden_TD
    if mode == "gated":
        own = torch.sigmoid(x_TD @ shared.shared_gate.t()) * own
    wanted = (routed + own) / 2 if mode == "average" else routed + own
    torch.testing.assert_close(joined, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"experts__activation": "relu2", "model__first_dense": 1, "experts__num_shared": 1},
        {"experts__activation": "gpt_oss", "experts__bias": True, "experts__activation_limit": 7.0},
        {"experts__activation": "relu", "experts__bias": True},
        {"experts__num_shared": 2, "experts__shared_mode": "gated"},
        {"experts__num_shared": 2, "experts__shared_mode": "average"},
    ],
)
def test_counts_equal_the_built_module(changes: dict[str, Any]) -> None:
    model = Decoder(tiny(dispatch="local", **changes), alone(), VOCAB)
    report = size_report(model.config, VOCAB)
    named = dict(model.named_parameters())
    assert report.total == sum(p.numel() for p in named.values())
    assert report.routed == sum(named[name].numel() for name in model.expert_names())
    assert report.active == report.total - report.routed + report.routed * 2 // 8


@pytest.mark.parametrize("ep_size", [1, 2])
def test_biases_do_not_decay_though_they_are_stacked(ep_size: int) -> None:
    model = Decoder(tiny(dispatch="local", experts__bias=True), alone(), VOCAB)
    for group in parameter_groups(model, ep_size):
        assert all(("norm" in name or "bias" in name) != group.decays for name in group.params)
        assert all((".experts." in name and ep_size > 1) == group.is_expert for name in group.params)


def test_what_cannot_be_is_refused() -> None:
    assert gate_to_limit("relu2", 7.0) is not None
    assert gate_to_limit("swiglu", 7.0) is None
    assert gate_to_limit("relu2", None) is None
    assert shared_to_join("gated", 0) is not None
    assert shared_to_join("gated", 1) is None
    assert shared_to_join("add", 0) is None
