"""The routing walk is the layer's own routing; what experts specialise in is counted right."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain.cli import main
from moetrain.inspect.corpus import lift, vocabulary_specialisation
from moetrain.inspect.demo import demo
from moetrain.inspect.observe import Seen
from moetrain.inspect.tally import Tally
from moetrain.inspect.walk import Walk, walk
from moetrain.inspect.walk_text import table, walk_text
from moetrain.moe.layer import MoELayer
from moetrain.moe.replay import Replay
from moetrain.types import ConfigError, Placement, Routing
from tests.catalog import tiny_with
from tests.tiny import moe_layer, seen, there_and_back

NUM_TOKENS = 12
WORDS = [f"w{t}" for t in range(NUM_TOKENS)]
TIGHT = {"capacity__factor_eval": 0.8, "capacity__minimum": 1}


def layer_and_seen(router: str, **changes: Any) -> tuple[MoELayer, Seen]:
    """A layer with that router in evaluation, and what it did with twelve random tokens."""
    layer = moe_layer(tiny_with(router, **changes)).eval()
    x_TD = torch.randn(NUM_TOKENS, 16, generator=torch.Generator().manual_seed(3))
    given, replay = seen(x_TD), Replay()
    with torch.no_grad():
        for name, buffer in layer.router.named_buffers():
            if name == "bias_E":
                buffer.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(4))
        placement = layer.capacity(layer.router(given, replay), 1, replay)
    return layer, Seen(layer.router, layer.capacity, layer.experts, given, placement, torch.arange(NUM_TOKENS))


@pytest.mark.parametrize(
    ("router", "changes"),
    [
        ("topk", TIGHT),
        ("topk", TIGHT | {"capacity__renormalise": True}),
        ("topk", TIGHT | {"capacity__priority": "random"}),
        ("topk", {"capacity__factor_eval": None}),
        ("topk", TIGHT | {"capacity__scope": "sequence"}),
        ("gpt_oss", TIGHT),
        ("mixtral", TIGHT),
        ("deepseek_v3", TIGHT),
        ("llama4", TIGHT),
        ("switch", TIGHT),
        ("laguna", TIGHT),
    ],
)
def test_the_walk_is_what_the_layer_does(router: str, changes: dict[str, Any]) -> None:
    """Choice, slots, weights, and after dispatch, experts and combine the same sums."""
    layer, done = layer_and_seen(router, **changes)
    taken, placement = walk(done, WORDS), done.placement
    assert torch.equal(taken.expert_TK, placement.routing.expert_TK)
    assert torch.equal(taken.slot_TK, placement.slot_TK)
    assert torch.equal(taken.kept_TK, placement.kept_TK)
    assert taken.dropless == (placement.capacity is None)
    assert bool(taken.kept_TK.all()) == taken.dropless
    torch.testing.assert_close(taken.logits_TE, placement.routing.logits_TE)
    torch.testing.assert_close(taken.kept_weight_TK, placement.routing.weight_TK * placement.kept_TK)
    with torch.no_grad():
        (out_TD,) = there_and_back(layer.dispatcher, done.given.x_TD, placement, layer.experts).home
    torch.testing.assert_close(taken.out_TD, out_TD)


def test_its_tables_are_those_of_the_tensors() -> None:
    taken = walk(demo(), ["to", "be", "or", "not", "to", "be"])
    assert not taken.kept_TK.all(), "the example is to show what dropping is"
    assert not taken.kept_TK[5].any(), "and a token that nobody takes"
    picked_M = (taken.position_ME * taken.served_ME).sum(1)
    assert torch.equal(picked_M.view(2, 6).t(), taken.slot_TK)
    text = walk_text(taken, "A walk")
    steps = [line for line in text.splitlines() if line.startswith("## ")]
    assert [step.split(". ")[1] for step in steps] == [
        "Logits", "Noise", "Top k", "Weights", "One-hot", "Permute to choice-major", "Cumulative sum", "Slots",
        "Weight tensor", "What comes back",
    ]  # fmt: skip
    expert, slot, weight = int(taken.expert_TK[0, 0]), int(taken.slot_TK[0, 0]), float(taken.weight_TK[0, 0])
    assert f"{weight:.2f} y{expert}.{slot}" in text
    assert "5: `be`" in text
    assert text.count("nothing") == 1


@pytest.mark.parametrize("router", ["expert_choice", "longcat", "hash", "remoe"])
def test_other_ways_of_routing_have_no_walk(router: str) -> None:
    with pytest.raises(ConfigError, match="token-choice"):
        walk(layer_and_seen(router)[1], WORDS)


@pytest.mark.parametrize("priority", ["token_major", "probs", "batch_prioritised"])
def test_other_orders_of_service_have_no_walk_unless_nothing_is_dropped(priority: str) -> None:
    with pytest.raises(ConfigError, match="choice by choice"):
        walk(layer_and_seen("topk", **TIGHT, capacity__priority=priority)[1], WORDS)
    _, free = layer_and_seen("topk", capacity__priority=priority)
    assert torch.equal(walk(free, WORDS).slot_TK, free.placement.slot_TK)


def test_the_walk_in_the_documents_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """moetrain inspect --walk > recipes/routing_walk.md"""
    assert main(["inspect", "--walk"]) == 0
    assert capsys.readouterr().out == (Path(__file__).parents[1] / "recipes" / "routing_walk.md").read_text()


def test_words_can_not_break_a_table() -> None:
    assert table(["a", "b"], [["x|y", "1"]]).splitlines()[2] == "| x\\|y |   1 |"
    taken: Walk = replace(walk(demo(), ["to"] * 6), words=("<end>", "`", "_x_", "a|b", "*", "#"))
    text = walk_text(taken, "A walk")
    assert "0: `<end>`" in text
    assert "1: `` ` ``" in text
    assert "3: `a\\|b`" in text


def made_up(expert_TK: Tensor, valid_TK: Tensor | None, kept_TK: Tensor, tokens_BS: Tensor) -> Seen:
    num_experts = 4
    logits_TE = torch.zeros(len(expert_TK), num_experts)
    weight_TK = torch.ones(expert_TK.shape)
    routing = Routing(logits_TE, logits_TE.softmax(-1), expert_TK, weight_TK, valid_TK)
    _, like = layer_and_seen("topk")
    given = replace(like.given, x_TD=torch.zeros(len(expert_TK), 1), tokens_BS=tokens_BS)
    placement = Placement(routing, kept_TK, torch.zeros_like(expert_TK), 1)
    return replace(like, given=given, placement=placement, place_T=torch.arange(len(expert_TK)))


def test_a_tally_counts_what_a_loop_counts() -> None:
    """Two micro-batches of two sequences of eight, some entries no assignments, some dropped."""
    generator = torch.Generator().manual_seed(0)
    tally, ids = Tally(4, torch.tensor([2, 5, 9]), 8, 3), [2, 5, 9]
    expected: dict[str, Tensor] = {name: torch.zeros(*shape, dtype=torch.int64) for name, shape in {
        "token_UE": (3, 4), "domain_DE": (3, 4), "position_PE": (8, 4), "together_EE": (4, 4),
        "assigned_E": (4,), "kept_E": (4,),
        "occurred_U": (3,)}.items()}  # fmt: skip
    for _ in range(2):
        expert_TK = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(16)])
        valid_TK = torch.rand(16, 2, generator=generator) < 0.8
        kept_TK = valid_TK & (torch.rand(16, 2, generator=generator) < 0.7)
        tokens_BS = torch.tensor(ids)[torch.randint(0, 3, (2, 8), generator=generator)]
        domain_BS = torch.randint(0, 3, (2, 8), generator=generator)
        tally.add(made_up(expert_TK, valid_TK, kept_TK, tokens_BS), domain_BS)
        for t, token in enumerate(tokens_BS.flatten().tolist()):
            chosen = [int(e) for e, valid in zip(expert_TK[t], valid_TK[t], strict=True) if valid]
            expected["occurred_U"][ids.index(token)] += 1
            for e in chosen:
                expected["token_UE"][ids.index(token), e] += 1
                expected["domain_DE"][domain_BS.flatten()[t], e] += 1
                expected["position_PE"][t % 8, e] += 1
                expected["assigned_E"][e] += 1
                for other in chosen:
                    expected["together_EE"][e, other] += 1
            for e in expert_TK[t][kept_TK[t]].tolist():
                expected["kept_E"][e] += 1
    for name, counts in expected.items():
        assert torch.equal(getattr(tally, name), counts), name
    assert tally.entropy == pytest.approx(32 * math.log(4), rel=1e-6)


def test_lift_and_vocabulary_specialisation() -> None:
    """Id 0 goes to expert 0 only, id 1 to both alike, id 2 came too seldom."""
    counts_UE = torch.tensor([[8, 0], [4, 4], [1, 0]])
    lift_UE = lift(counts_UE)
    assert float(lift_UE[0, 0]) == pytest.approx((8 / 13) / (8 / 17))
    assert float(lift_UE[1, 1]) == pytest.approx(1.0 / (8 / 17))
    occurred_U = torch.tensor([8, 8, 1])
    assert vocabulary_specialisation(counts_UE, occurred_U, 8) == pytest.approx((1.0 + 0.5) / 2)
    assert vocabulary_specialisation(counts_UE, occurred_U, 9) is None
