"""Capacity and losses against the libraries that made them known: run where they can be run, written out where not.

Where a library does not do what it says, a test names the defect, and ours is held to the formula.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain.config import BalanceConfig
from moetrain.moe.balance import Balance
from moetrain.moe.replay import Replay
from moetrain.moe.units import to_ours
from moetrain.types import RouterInput, Routing
from tests.gating import NONE_YET, E, T, balance_of, combine_tensor, crowded, placed, routed
from tests.tiny import alone, ids, moe_layer, tiny

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from deepspeed.moe.sharded_moe import TopKGate, top1gating, top2gating, topkgating
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
    from transformers.models.nllb_moe import modeling_nllb_moe as nllb
    from transformers.models.nllb_moe.configuration_nllb_moe import NllbMoeConfig
    from transformers.models.switch_transformers import modeling_switch_transformers as switch
    from transformers.models.switch_transformers.configuration_switch_transformers import SwitchTransformersConfig

TARGET = "moetrain.moe.routers.token_choice.TokenChoiceRouter"


def test_deepspeed_top1_without_drops() -> None:
    logits_TE = crowded()
    aux, combine, _, counts = top1gating(logits_TE.clone(), 8.0, 1, use_rts=False)
    routing = routed(logits_TE, 1, "scores")
    torch.testing.assert_close(combine_tensor(placed(routing, combine.shape[2])), combine, rtol=0, atol=1e-6)
    assert balance_of(routing).balance.item() == pytest.approx(aux.item(), rel=1e-5)
    assert counts.max() <= combine.shape[2]


def test_deepspeed_top1_drops_by_position_are_not_by_position() -> None:
    """It asks topk of a 0/1 mask, whose order among ties is undefined. Ours keeps the first C."""
    logits_TE = torch.zeros(4096, E)
    logits_TE[:, 0] = 1.0
    _, combine, _, _ = top1gating(logits_TE.clone(), 1.0, 1, use_rts=False)
    slots, first = combine.shape[2], list(range(4096 // E))
    assert combine.sum((1, 2)).nonzero().flatten().tolist() != first
    kept_TK = placed(routed(logits_TE, 1, "scores"), slots).kept_TK
    assert kept_TK.flatten().nonzero().flatten().tolist() == first


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_deepspeed_top2(factor: float) -> None:
    """Slots, drops, weights normalised anew after dropping, and its loss, which looks at first choices only."""
    logits_TE = crowded()
    aux, combine, dispatch, _ = top2gating(logits_TE.clone(), factor, 1, top2_2nd_expert_sampling=False)
    slots = max(math.ceil(T / E * 2 * factor), 1)
    assert combine.shape[2] == slots
    routing = routed(logits_TE, 2, "chosen_softmax")
    ours = placed(routing, slots, renormalise=True)
    torch.testing.assert_close(combine_tensor(ours), combine, rtol=0, atol=1e-6)
    assert 0 < int(dispatch.sum()) < 2 * T
    firsts = Routing(routing.logits_TE, routing.probs_TE, routing.expert_TK[:, :1], routing.weight_TK[:, :1])
    assert balance_of(firsts).balance.item() == pytest.approx(aux.item(), rel=1e-5)


@pytest.mark.parametrize(("policy", "priority"), [("probs", "probs"), ("position", "token_major")])
def test_deepspeed_top3(policy: str, priority: str) -> None:
    """``position`` is token-major there. It orders by probabilities; so do weights that are the probabilities."""
    logits_TE = crowded()
    aux, combine, dispatch, _ = topkgating(logits_TE.clone(), 3, 0.5, 1, drop_policy=policy)
    routing = routed(logits_TE, 3, "scores")
    ours = placed(routing, combine.shape[2], priority=priority, renormalise=True)
    before_T1 = routing.weight_TK.sum(1).view(-1, 1, 1)
    if policy == "position":
        torch.testing.assert_close(combine_tensor(ours) / before_T1, combine, rtol=0, atol=1e-6)
    weight_TE = combine_tensor(ours).sum(2) / before_T1.view(-1, 1)
    torch.testing.assert_close(weight_TE, combine.sum(2), rtol=0, atol=1e-6)
    assert 0 < int(dispatch.sum()) < 3 * T
    assert balance_of(routing).balance.item() == pytest.approx(aux.item(), rel=1e-5)


def test_deepspeed_gates_are_random_in_evaluation_and_ours_are_not() -> None:
    """Random token selection (k = 1) and the sampled second expert (k = 2) do not look at ``training``."""
    x_TD = torch.randn(256, 16)
    for top_k in (1, 2):
        gate = TopKGate(16, E, k=top_k, capacity_factor=0.5, eval_capacity_factor=0.5, min_capacity=1).eval()
        kept = [gate(x_TD)[2] for _ in range(2)]
        assert not torch.equal(*kept)
    router = {"_target_": TARGET, "top_k": 2, "weights": "chosen_softmax", "second": "random"}
    config = tiny(dispatch="local", router=router, capacity__factor_eval=0.5, capacity__priority="random")
    layer = moe_layer(config).eval()
    once, again = (layer(x_TD, ids(x_TD, 1), Replay()).hidden_TD for _ in range(2))
    assert torch.equal(once, again)


def switch_pair(slots: int) -> tuple[Any, Any]:
    """Hugging Face's Switch block, and our layer with its weights."""
    config = SwitchTransformersConfig(
        d_model=16, d_ff=24, num_experts=E, expert_capacity=slots, router_jitter_noise=0.0, dropout_rate=0.0
    )
    torch.manual_seed(0)
    block = switch.SwitchTransformersSparseMLP(config)
    torch.nn.init.normal_(block.router.classifier.weight, std=0.5)
    ours = tiny(
        dispatch="padded",
        router={"_target_": TARGET, "top_k": 1, "weights": "scores"},
        experts__activation="relu",
        capacity__factor_train=1.0,
        capacity__slots_train=slots,
        capacity__scope="sequence",
    )
    layer = moe_layer(ours)
    with torch.no_grad():
        layer.router.gate.copy_(block.router.classifier.weight)
        for e in range(E):
            layer.experts.up[e] = block.experts[f"expert_{e}"].wi.weight
            layer.experts.down[e] = block.experts[f"expert_{e}"].wo.weight
    return block, layer


def test_huggingface_switch_with_slots_for_each_row() -> None:
    block, layer = switch_pair(slots=3)
    x_BSD = torch.randn(4, 12, 16, requires_grad=True)
    theirs = block(x_BSD)
    selected, _, logits = block.router(x_BSD)
    out = layer(x_BSD.flatten(0, 1), torch.zeros(4, 12, dtype=torch.int64), Replay())
    torch.testing.assert_close(out.hidden_TD.view_as(theirs), theirs, rtol=1e-5, atol=1e-6)
    assert 0 < int(selected.sum()) < 48
    probe = torch.linspace(-1, 1, 16)
    mine = torch.autograd.grad((out.hidden_TD * probe).sum(), [x_BSD, layer.router.gate])
    other = torch.autograd.grad((theirs * probe).sum(), [x_BSD, block.router.classifier.weight])
    for ours, reference in zip(mine, other, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)
    aux = switch.load_balancing_loss_func(logits.softmax(-1), logits.argmax(-1))
    assert out.losses.balance.item() == pytest.approx(aux.item(), rel=1e-5)
    assert out.losses.z.item() == pytest.approx(switch.router_z_loss_func(logits).item(), rel=1e-5)


@pytest.mark.parametrize("prioritised", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_nllb_router(before: bool, prioritised: bool) -> None:
    """Weights normalised before or after dropping, tokens in their order or the surest first."""
    config = NllbMoeConfig(
        d_model=16,
        num_experts=E,
        expert_capacity=7,
        second_expert_policy="all",
        normalize_router_prob_before_dropping=before,
        batch_prioritized_routing=prioritised,
    )
    logits_TE = crowded()
    _, theirs = nllb.NllbMoeTop2Router(config).train().route_tokens(logits_TE.clone())
    priority: Any = "batch_prioritised" if prioritised else "choice_major"
    ours = placed(routed(logits_TE, 2, "chosen_softmax"), 7, priority=priority, renormalise=not before)
    torch.testing.assert_close(combine_tensor(ours).sum(2), theirs, rtol=0, atol=1e-6)
    assert 0 < int((theirs > 0).sum()) < 2 * T


def test_nllb_block_runs_two_experts_only() -> None:
    """It takes a 0/1 mask for expert ids, so experts 0 and 1 get everything. Only the router is a reference."""
    config = NllbMoeConfig(d_model=16, num_experts=E, expert_capacity=64, activation_dropout=0.0)
    block = nllb.NllbMoeSparseMLP(config, 24).eval()
    ran = []
    for name, expert in block.experts.items():
        expert.register_forward_hook(lambda *_, name=name: ran.append(name))
    x_BSD = torch.randn(1, T, 16)
    block(x_BSD)
    assert set(ran) <= {"expert_0", "expert_1"}
    chosen_T = block.router(x_BSD.flatten(0, 1))[1].argmax(1)
    assert len(set(chosen_T.tolist())) > 2


def test_huggingface_loss_is_k_times_ours_and_cancels_over_layers() -> None:
    """The value of one layer fixes the unit; layers that collapse on different experts read as balanced there."""
    for top_k in (1, 2, 4):
        logits_TE = crowded()
        theirs = load_balancing_loss_func((logits_TE,), E, top_k).item()
        unit = to_ours(1.0, "huggingface", top_k=top_k, num_experts=E, num_moe_layers=3)
        assert unit * balance_of(routed(logits_TE, top_k, "scores")).balance.item() == pytest.approx(theirs, rel=1e-5)
        even_TE = sum(torch.eye(E).roll(shift, 1) * (1 - 0.1 * shift) for shift in range(top_k)).repeat(4, 1)
        assert load_balancing_loss_func((even_TE,) * 3, E, top_k).item() == pytest.approx(unit, rel=1e-5)
    collapsed = []
    for layer in range(4):
        logits_TE = torch.full((T, E), -20.0)
        logits_TE[:, 2 * layer : 2 * layer + 2] = 20.0
        collapsed.append(logits_TE)
    assert load_balancing_loss_func(tuple(collapsed), E, 2).item() == pytest.approx(2.0, rel=1e-4)
    ours = [balance_of(routed(logits_TE, 2, "scores")).balance.item() for logits_TE in collapsed]
    assert sum(ours) / 4 == pytest.approx(4.0, rel=1e-4)


def megatron_aux(probs_TE: Tensor, expert_TK: Tensor) -> float:
    """``E / (k T^2) * sum_e (sum_t p) * c_e``."""
    num_tokens, top_k = expert_TK.shape
    counts = [int((expert_TK == e).sum()) for e in range(E)]
    summed = sum(probs_TE[:, e].sum().item() * counts[e] for e in range(E))
    return E / (top_k * num_tokens**2) * summed


def test_megatron_losses() -> None:
    logits_TE = crowded()
    routing = routed(logits_TE, 2, "scores")
    probs_TE, expert_TK = logits_TE.softmax(-1), logits_TE.topk(2).indices
    assert balance_of(routing).balance.item() == pytest.approx(megatron_aux(probs_TE, expert_TK), rel=1e-5)
    rows = [megatron_aux(p, e) for p, e in zip(probs_TE.chunk(4), expert_TK.chunk(4), strict=True)]
    assert balance_of(routing, "sequence", 4).balance.item() == pytest.approx(sum(rows) / 4, rel=1e-5)
    z = sum(float(row.exp().sum().log() ** 2) for row in logits_TE) / T
    assert balance_of(routing).z.item() == pytest.approx(z, rel=1e-5)


def test_megatron_global_loss_averages_counts_over_the_micro_batches_so_far() -> None:
    balance, seen_E, sums_E = Balance(BalanceConfig(scope="global_batch"), E, alone()), NONE_YET, torch.zeros(E)
    for number in range(1, 4):
        logits_TE = crowded(seed=number)
        routing = routed(logits_TE, 2, "scores")
        counts_E = torch.stack([(routing.expert_TK == e).sum() for e in range(E)])
        sums_E = sums_E + counts_E
        running_E = sums_E / number
        wanted = E / (2 * T**2) * (running_E * logits_TE.softmax(-1).sum(0)).sum().item()
        assert balance(routing, 1, seen_E).balance.item() == pytest.approx(wanted, rel=1e-5)
        seen_E = seen_E + counts_E


def test_megatron_drops_the_smallest_weights_and_leaves_the_rest_as_they_are() -> None:
    logits_TE = crowded()
    routing = routed(logits_TE, 2, "chosen_softmax")
    slots = math.ceil(2 * T / E * 0.75)
    dense_TE = torch.zeros(T, E).scatter(1, routing.expert_TK, routing.weight_TK)
    wanted_TE = torch.zeros(T, E)
    for e in range(E):
        best_C = dense_TE[:, e].topk(slots).indices
        wanted_TE[best_C, e] = dense_TE[best_C, e]
    ours = placed(routing, slots, priority="probs")
    torch.testing.assert_close(combine_tensor(ours).sum(2), wanted_TE, rtol=0, atol=0)
    assert int((wanted_TE > 0).sum()) < 2 * T


def test_megatron_position_policy_does_not_keep_the_first() -> None:
    """Its rule, topk of the 0/1 map for each expert, keeps others than the first C; ours keeps those."""
    expert_TK = torch.zeros(1024, 1, dtype=torch.int64)
    by_topk = (expert_TK == 0).int().topk(512, dim=0, sorted=False).indices.flatten().sort().values
    probs_TE = torch.full((1024, E), 1 / E)
    ours = placed(Routing(probs_TE, probs_TE, expert_TK, torch.ones(1024, 1)), 512, priority="token_major")
    first = list(range(512))
    assert ours.kept_TK.flatten().nonzero().flatten().tolist() == first
    assert by_topk.tolist() != first


def nano_moe(x_TD: Tensor, layer: Any, top_k: int, factor: float) -> Tensor:
    """combine [T, E*C] times what the experts make of dispatch^T x."""
    logits_TE = x_TD @ layer.router.gate.t()
    top_TK, expert_TK = logits_TE.topk(top_k)
    slots = math.floor(top_k * factor * len(x_TD) / E)
    slots = max(slots + slots % 2, 4)
    mask_NE = torch.nn.functional.one_hot(expert_TK, E).permute(1, 0, 2).reshape(-1, E)
    slot_KT = ((mask_NE.cumsum(0) - 1) * mask_NE).sum(-1).view(top_k, -1)
    combine_TEC = torch.zeros(len(x_TD), E, slots)
    for t, k in [(t, k) for t in range(len(x_TD)) for k in range(top_k) if slot_KT[k, t] < slots]:
        combine_TEC[t, expert_TK[t, k], slot_KT[k, t]] = top_TK.softmax(-1)[t, k]
    rows_ECD = torch.einsum("tec,td->ecd", (combine_TEC > 0).float(), x_TD)
    hidden_ECF = torch.einsum("ecd,efd->ecf", rows_ECD, layer.experts.gate_up)
    gate, up = hidden_ECF.chunk(2, dim=-1)
    out_ECD = torch.einsum("ecf,edf->ecd", torch.nn.functional.silu(gate) * up, layer.experts.down)
    return torch.einsum("tec,ecd->td", combine_TEC, out_ECD)


@pytest.mark.parametrize("dispatch", ["padded", "alltoall"])
def test_nano_moe_layer(dispatch: str) -> None:
    config = tiny(dispatch=dispatch, capacity__factor_train=0.75)
    layer, x_TD = moe_layer(config), torch.randn(T, 16) + 0.5
    ours = layer(x_TD, ids(x_TD, 4), Replay())
    torch.testing.assert_close(ours.hidden_TD, nano_moe(x_TD, layer, 2, 0.75), rtol=1e-4, atol=1e-5)
    kept = layer.capacity(layer.router(RouterInput(x_TD, ids(x_TD, 4)), Replay()), 4, Replay()).kept_TK
    assert int(kept.sum()) < 2 * T
