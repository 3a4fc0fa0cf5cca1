"""The losses beside the balance loss, against loops over tokens; their scopes, their layouts, and foreign units."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moetrain.compose import compose
from moetrain.config import BalanceConfig, BalanceUnits
from moetrain.models.decoder import Decoder
from moetrain.moe.balance import Balance
from moetrain.moe.units import in_our_units, to_ours
from moetrain.ops.spread import cv_squared
from moetrain.parallel.mesh import Mesh, mesh_of_world
from moetrain.plan import describe, make_plan
from moetrain.rules.shapes import devices_a_token_reaches, devices_of_experts
from moetrain.types import Routing
from tests.ranks import run_ranks
from tests.tiny import VOCAB, alone, tiny, tokens

E, D, K, CPU = 8, 4, 3, torch.device("cpu")
SCOPES = ["micro_batch", "sequence", "global_batch"]
NEW = ("device", "communication", "importance")
NONE_YET = torch.zeros(E, dtype=torch.int64)


def all_losses(scope: Any, **changes: Any) -> BalanceConfig:
    settings = {"device_coef": 1.0, "communication_coef": 1.0, "importance_coef": 1.0, "num_devices": D}
    return BalanceConfig(scope=scope, **settings | changes)


def routing_of(logits_TE: Tensor, ragged: bool) -> Routing:
    """Top-k with weights of the softmax; of a ragged row some entries are none."""
    probs_TE = logits_TE.softmax(-1)
    weight_TK, expert_TK = probs_TE.topk(K)
    valid_TK = None
    if ragged:
        valid_TK = torch.arange(K) < (torch.arange(len(logits_TE)) % (K + 1)).unsqueeze(1)
        weight_TK = weight_TK * valid_TK
    return Routing(logits_TE, probs_TE, expert_TK, weight_TK, valid_TK)


def plain(routing: Routing, tokens: range, devices_per_token: int) -> dict[str, Tensor]:
    """Every loss of one set of tokens, written out."""
    count, sent, importance = [0.0] * E, [0.0] * D, [torch.zeros(())] * E
    for t in tokens:
        reached = set()
        for k in range(K):
            if routing.valid_TK is None or routing.valid_TK[t, k]:
                e = int(routing.expert_TK[t, k])
                count[e] += 1
                importance[e] = importance[e] + routing.weight_TK[t, k]
                reached.add(e // (E // D))
        for d in reached:
            sent[d] += 1
    p = routing.probs_TE[tokens.start : tokens.stop].mean(0)
    per_mean = [c * E / sum(count) for c in count]
    group = [range(d * E // D, (d + 1) * E // D) for d in range(D)]
    of_device = [p[list(group[d])].sum() for d in range(D)]
    f_device = [sum(per_mean[e] for e in group[d]) / len(group[d]) for d in range(D)]
    f_sent = [D / (devices_per_token * len(tokens)) * s for s in sent]
    mean = sum(importance) / E
    return {
        "balance": sum(per_mean[e] * p[e] for e in range(E)),
        "device": sum(f * q for f, q in zip(f_device, of_device, strict=True)),
        "communication": sum(f * q for f, q in zip(f_sent, of_device, strict=True)),
        "importance": sum((i - mean) ** 2 for i in importance) / E / mean**2,
    }  # type: ignore[return-value]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
def test_every_loss_is_its_formula_in_value_and_gradient(scope: str, ragged: bool) -> None:
    torch.manual_seed(0)
    logits_TE = (torch.randn(24, E) + torch.linspace(0, 2, E)).requires_grad_()
    routing = routing_of(logits_TE, ragged)
    ours = Balance(all_losses(scope), E, alone())(routing, 3, NONE_YET).named()
    sets = [range(s * 8, (s + 1) * 8) for s in range(3)] if scope == "sequence" else [range(24)]
    parts = [plain(routing, tokens, min(K, D)) for tokens in sets]
    for name in ("balance", *NEW):
        wanted = torch.stack([part[name] for part in parts]).mean()
        torch.testing.assert_close(ours[name], wanted, rtol=1e-5, atol=1e-6, msg=name)
        gradients = [torch.autograd.grad(loss, logits_TE, retain_graph=True)[0] for loss in (ours[name], wanted)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
        assert bool((gradients[0] != 0).any())


@pytest.mark.parametrize("scope", SCOPES)
def test_values_when_even_and_when_collapsed(scope: str) -> None:
    balance = Balance(all_losses(scope, devices_per_token=2), E, alone())
    even_TK = torch.arange(32).view(16, 2).mul(3).remainder(E)
    flat_TE = torch.full((16, E), 1 / E)
    even = balance(Routing(torch.zeros(16, E), flat_TE, even_TK, flat_TE[:, :2]), 2, NONE_YET).named()
    assert [even[name].item() for name in NEW] == pytest.approx([1.0, 1.0, 0.0])
    collapsed_TK = torch.tensor([[0, 1]]).expand(16, 2)
    onto_TE = torch.zeros(16, E)
    onto_TE[:, :2] = 0.5
    collapsed = balance(Routing(torch.zeros(16, E), onto_TE, collapsed_TK, onto_TE[:, :2]), 2, NONE_YET).named()
    assert [collapsed[name].item() for name in NEW] == pytest.approx([D, D / 2, E / 2 - 1])


def test_nothing_is_computed_for_a_coefficient_of_zero() -> None:
    routing = routing_of(torch.randn(24, E, requires_grad=True), False)
    losses = Balance(BalanceConfig(), E, alone())(routing, 3, NONE_YET).named()
    assert all(losses[name].grad_fn is None and losses[name].item() == 0 for name in NEW)


def test_devices_are_the_ranks_of_expert_parallelism_unless_told() -> None:
    routing = routing_of(torch.randn(24, E), False)
    two = Mesh(rank=0, world_size=2, ep_size=2, device=CPU)
    by_mesh = Balance(all_losses("micro_batch", num_devices=None), E, two)(routing, 3, NONE_YET)
    by_number = Balance(all_losses("micro_batch", num_devices=2), E, alone())(routing, 3, NONE_YET)
    assert by_mesh.device.item() == by_number.device.item()
    assert by_mesh.device.item() != Balance(all_losses("micro_batch"), E, alone())(routing, 3, NONE_YET).device.item()


def test_an_empty_set_gives_zero_and_not_nan() -> None:
    assert cv_squared(torch.zeros(2, E)).item() == 0
    routing = routing_of(torch.randn(8, E), False)
    none = Routing(routing.logits_TE, routing.probs_TE, routing.expert_TK, torch.zeros(8, K), torch.zeros(8, K) > 0)
    losses = Balance(all_losses("sequence"), E, alone())(none, 2, NONE_YET).named()
    assert all(losses[name].item() == 0 for name in ("balance", *NEW))


def part(scope: str, start: int, stop: int, mesh: Mesh) -> dict[str, np.ndarray]:
    """Values, and gradients of the logits, of tokens start..stop of a routing that all ranks draw alike."""
    whole = (torch.randn(24, E, generator=torch.Generator().manual_seed(1)) + torch.linspace(0, 2, E)).requires_grad_()
    routing = routing_of(whole[start:stop], ragged=False)
    losses = Balance(all_losses(scope), E, mesh)(routing, (stop - start) // 4, NONE_YET).named()
    found = {}
    for name in ("balance", *NEW):
        found[name] = losses[name].detach().numpy()
        found[f"{name} gradient"] = torch.autograd.grad(losses[name], whole, retain_graph=True)[0].numpy()
    return found


def on_a_rank(rank: int, world: int) -> list[dict[str, np.ndarray]]:
    mesh = mesh_of_world(1, CPU)
    return [part(scope, 12 * rank, 12 * (rank + 1), mesh) for scope in ("sequence", "global_batch")]


def test_the_mean_over_ranks_is_the_loss_of_one_process() -> None:
    ranks = run_ranks(2, on_a_rank)
    for number, scope in enumerate(("sequence", "global_batch")):
        for name, whole in part(scope, 0, 24, alone()).items():
            mean = (ranks[0][number][name] + ranks[1][number][name]) / 2
            np.testing.assert_allclose(mean, whole, rtol=1e-5, atol=1e-7, err_msg=f"{scope} {name}")


def test_what_each_library_calls_balanced() -> None:
    """An even load of k = 2 of 8 experts, in every library's formula, times a coefficient of 1 and three layers."""
    num_tokens, top_k, layers = 16, 2, 3
    count = np.full(E, num_tokens * top_k / E)
    first, p = np.full(E, num_tokens / E), np.full(E, 1 / E)
    theirs: dict[BalanceUnits, float] = {
        "moetrain": E * sum(count / count.sum() * p),
        "huggingface": E * sum(count * layers / (num_tokens * layers) * p),
        "megatron": layers * E / (top_k * num_tokens**2) * sum(p * num_tokens * count),
        "megablocks": E / (layers * num_tokens * top_k) * sum(sum(count * p) for _ in range(layers)),
        "gshard": layers * np.mean(first / num_tokens * p),
        "deepspeed": layers * E * E * np.mean(p * first / num_tokens),
        "switch": layers * E * sum(first / num_tokens * p),
    }
    for units, value in theirs.items():
        ours = to_ours(1.0, units, top_k=top_k, num_experts=E, num_moe_layers=layers)
        assert ours == pytest.approx(value), units


def test_the_loss_of_a_model_is_weighed_in_our_units() -> None:
    config = tiny(dispatch="local", balance__units="huggingface", balance__balance_coef=0.1)
    out = Decoder(config, alone(), VOCAB)(tokens(2, 16))
    torch.testing.assert_close(out.loss, out.lm + 0.2 * out.losses.balance + 0.01 * out.losses.z)
    config = tiny(dispatch="local", balance__units="megatron", balance__balance_coef=0.1, balance__device_coef=0.5)
    out = Decoder(config, alone(), VOCAB)(tokens(2, 16))
    wanted = out.lm + 2 * (0.1 * out.losses.balance + 0.5 * out.losses.device + 0.01 * out.losses.z)
    torch.testing.assert_close(out.loss, wanted)


def test_check_says_what_a_foreign_coefficient_becomes() -> None:
    foreign = compose(["recipe=quickstart", "balance=global_batch"])
    assert "from units of huggingface: balance_coef 0.001 = 0.002 in moetrain's" in describe(make_plan(foreign, 1))
    summed = describe(make_plan(compose(["recipe=quickstart", "balance=deepseek_v2"]), 1))
    assert "balance_coef 0.003 = 0.012, device_coef 0.05 = 0.2, communication_coef 0.02 = 0.08" in summed
    assert "units of" not in describe(make_plan(compose(["recipe=quickstart"]), 1))
    assert in_our_units(foreign.balance, top_k=2, num_experts=8, num_moe_layers=4).units == "moetrain"


@pytest.mark.parametrize(
    ("name", "balance", "z"),
    [
        ("default", 0.01, 0.001),
        ("switch", 0.01 * 58, 0.0),
        ("st_moe", 0.01, 0.001),
        ("sequence", 0.0001 * 58, 0.0),
        ("deepseek_v2", 0.003 * 58, 0.0),
        ("mixtral", 0.02 * 6, 0.0),
        ("qwen2_moe", 0.001 * 6, 0.0),
        ("global_batch", 0.001 * 6, 0.0),
        ("dbrx", 0.05, 0.0),
        ("olmoe", 0.01, 0.001),
        ("ling", 0.015, 0.0001),
    ],
)
def test_what_a_published_option_means_with_58_layers_and_6_experts_a_token(
    name: str, balance: float, z: float
) -> None:
    """A sum over layers is so many times our mean of them, in every coefficient that it has."""
    given = compose(["recipe=quickstart", f"balance={name}"]).balance
    ours = in_our_units(given, top_k=6, num_experts=8, num_moe_layers=58)
    assert (ours.balance_coef, ours.z_coef) == pytest.approx((balance, z))
    assert ours.device_coef == pytest.approx(given.device_coef * 58)
    assert ours.communication_coef == pytest.approx(given.communication_coef * 58)
    assert given.balance_coef in (0.01, 0.0001, 0.003, 0.02, 0.001, 0.05, 0.015), "the published number, as it is"


@pytest.mark.parametrize("scope", SCOPES)
def test_no_tokens_have_no_imbalance(scope: Any) -> None:
    layer = Balance(all_losses(scope), E, alone())
    logits_TE = torch.zeros(0, E, requires_grad=True)
    losses = layer(routing_of(logits_TE, False), 2, NONE_YET).named()
    assert all(value.item() == 0.0 for value in losses.values()), losses
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert logits_TE.grad is not None


def test_what_cannot_be_is_refused() -> None:
    assert devices_of_experts(3, 8) is not None
    assert devices_of_experts(4, 8) is None
    assert devices_of_experts(None, 8) is None
    assert devices_a_token_reaches(5, 4) is not None
    assert devices_a_token_reaches(2, 4) is None
