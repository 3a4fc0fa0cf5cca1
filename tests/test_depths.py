"""Mixture of Depths: who goes through a block in training and in evaluation, and what becomes of the others."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain.models.attention import document_mask, rotate
from moetrain.models.decoder import Decoder
from moetrain.models.mixture_of_depths import DepthBlock, DepthRouter
from moetrain.moe.replay import Replay
from moetrain.ops.init import Draw
from moetrain.ops.timeline import Timeline
from moetrain.types import LossTerms
from tests.tiny import VOCAB, alone, tiny, tokens

CPU = torch.device("cpu")
DEPTH = {
    "model__depth_every": 2,
    "model__depth_fraction": 0.3,
    "model__depth_coef": 0.5,
    "model__init_std": 0.3,
    "model__context": 12,
}
DENSE = {"model__moe_every": 2}  # block 0 is an MoE block, block 1, the routed one, is dense


def built(**changes: Any) -> Decoder:
    return Decoder(tiny(dispatch="local", **{**DEPTH, **changes}), alone(), VOCAB)


def routed(model: Decoder) -> DepthBlock:
    (block,) = [block for block in model.blocks if isinstance(block, DepthBlock)]
    return block


def inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    """x_BSD and the ids that those rows came from, 2 sequences of 12."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 12, 16, generator=generator), torch.randint(VOCAB, (2, 12), generator=generator)


def call(model: Decoder, x_BSD: Tensor, tokens_BS: Tensor, mask_B1SS: Tensor | None = None) -> Any:
    return routed(model)(x_BSD, tokens_BS, model.rotary, mask_B1SS, Replay())


def through_by_hand(block: DepthBlock, x_SD: Tensor) -> list[int]:
    """Positions of the tokens of one sequence that go through, by the words of the definition."""
    if not block.training:
        yes_S = x_SD @ block.depth.predictor[0] + block.depth.predictor_bias > 0
        return [position for position in range(12) if yes_S[position]]
    score_S = (x_SD @ block.depth.gate[0]).tolist()
    return sorted(sorted(range(12), key=lambda position: -score_S[position])[: math.ceil(0.3 * 12)])


def by_hand(model: Decoder, x_SD: Tensor, tokens_S: Tensor, document_S: list[int]) -> Tensor:
    """One sequence, token by token: each looks at the earlier ones that go through, head by head."""
    block, out_SD = routed(model), x_SD.clone()
    chosen, attention = through_by_hand(block, x_SD), block.attention
    parts = torch.nn.functional.linear(block.attention_norm(x_SD), attention.qkv).split([16, 8, 8], dim=-1)
    q_SHd, k_SHd, v_SHd = (part.unflatten(-1, (-1, 8)) for part in parts)
    turned = [rotate(t.transpose(0, 1), model.rotary).transpose(0, 1) for t in (q_SHd, k_SHd)]
    for here in chosen:
        seen = [other for other in chosen if other <= here and document_S[other] == document_S[here]]
        heads = []
        for head in range(2):
            scores = torch.stack([turned[0][here, head] @ turned[1][other, 0] for other in seen]) / math.sqrt(8)
            heads.append(sum(p * v_SHd[other, 0] for p, other in zip(scores.softmax(0), seen, strict=True)))
        attended_D = attention.out @ torch.cat(heads)
        one_11D = (x_SD[here] + attended_D).view(1, 1, -1)
        fed_D = block.feed(one_11D, tokens_S[here].view(1, 1), Replay()).hidden_BSD.flatten()
        out_SD[here] = x_SD[here] + (x_SD[here] @ block.depth.gate[0]) * (attended_D + fed_D)
    return out_SD


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("changes", [{}, DENSE])
def test_a_block_equals_token_by_token(changes: dict[str, Any], documents: bool, training: bool) -> None:
    model = built(**changes).train(training)
    x_BSD, tokens_BS = inputs()
    document_BS = torch.tensor([[0] * 5 + [1] * 7, [0] * 9 + [1] * 3]) if documents else torch.zeros(2, 12)
    mask_B1SS = document_mask(document_BS) if documents else None
    x_BSD.requires_grad_(True)
    found = call(model, x_BSD, tokens_BS, mask_B1SS).hidden_BSD
    expected = torch.stack([by_hand(model, *one) for one in zip(x_BSD, tokens_BS, document_BS.tolist(), strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert 2 < (found != x_BSD).any(-1).sum() < 22, "some tokens went through, and some did not"
    weights = {name: weight for name, weight in routed(model).named_parameters() if "predictor" not in name}
    wanted = [x_BSD, *weights.values()]
    torch.manual_seed(1)
    direction = torch.randn_like(found)
    ours = torch.autograd.grad((found * direction).sum(), wanted, allow_unused=True)
    theirs = torch.autograd.grad((expected * direction).sum(), wanted, allow_unused=True)
    for name, one, other in zip(["x", *weights], ours, theirs, strict=True):
        assert one is not None, name
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_router_losses_are_those_of_the_tokens_that_went_through() -> None:
    """Sequence scope: each sequence of chosen tokens by itself, by the formula."""
    model, (x_BSD, tokens_BS) = built(), inputs()
    seen: list[Tensor] = []
    layer = routed(model).moe
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    out = call(model, x_BSD, tokens_BS)
    probs_BCE = (seen[0].view(2, 4, 16) @ layer.router.gate.t()).softmax(-1)
    share_BE = torch.stack([torch.bincount(p.topk(2).indices.flatten(), minlength=8) / 8.0 for p in probs_BCE])
    expected = 8 * (share_BE * probs_BCE.mean(1)).sum(-1).mean()
    torch.testing.assert_close(out.losses.balance, expected)


def test_the_gate_learns_from_the_model_and_the_predictor_from_its_own_loss_alone() -> None:
    model, (x_BSD, tokens_BS) = built(), inputs()
    depth = routed(model).depth
    x_BSD.requires_grad_(True)
    out = call(model, x_BSD, tokens_BS)
    of_hidden = torch.autograd.grad(
        out.hidden_BSD.square().sum(),
        [depth.gate, depth.predictor, depth.predictor_bias],
        allow_unused=True,
        retain_graph=True,
    )
    assert of_hidden[0].abs().sum() > 0
    assert of_hidden[1] is None
    assert of_hidden[2] is None
    of_loss = torch.autograd.grad(
        out.depth, [depth.predictor, depth.predictor_bias, depth.gate, x_BSD], allow_unused=True
    )
    assert of_loss[0].abs().min() > 0
    assert of_loss[1].abs() > 0
    assert of_loss[2] is None
    assert of_loss[3] is None


def test_the_predictors_loss_is_its_cross_entropy_and_is_added_with_its_coefficient() -> None:
    model, (x_BSD, tokens_BS) = built(), inputs()
    block = routed(model)
    yes_BS = torch.sigmoid(x_BSD @ block.depth.predictor[0] + block.depth.predictor_bias).detach()
    terms = []
    for sequence in range(2):
        best = through_by_hand(block, x_BSD[sequence])
        terms += [-math.log(yes_BS[sequence, t] if t in best else 1 - yes_BS[sequence, t]) for t in range(12)]
    assert call(model, x_BSD, tokens_BS).depth.item() == pytest.approx(sum(terms) / 24, rel=1e-5)
    out = model(tokens(2, 12))
    rest = out.lm + 0.1 * out.losses.balance + 0.01 * out.losses.z
    torch.testing.assert_close(out.loss, rest + 0.5 * out.losses.depth)
    two = Decoder(tiny(dispatch="local", **DEPTH, model__num_layers=4), alone(), VOCAB)
    found: list[Tensor] = []
    for block in two.blocks[1::2]:
        block.register_forward_hook(lambda _, __, output: found.append(output.depth))
    torch.testing.assert_close(two(tokens(2, 12)).losses.depth, torch.stack(found).mean())


def test_the_predictor_learns_who_goes_through() -> None:
    torch.manual_seed(0)
    router, x_BSD = DepthRouter(dataclasses.replace(tiny().model, depth_every=1), CPU), torch.randn(16, 64, 16)
    router.init_weights(Draw(1), 0.3)
    optimiser = torch.optim.Adam([router.predictor, router.predictor_bias], lr=0.1)
    for _ in range(150):
        optimiser.zero_grad()
        router(x_BSD, Replay()).loss.backward()
        optimiser.step()
    depth = router(torch.randn(16, 64, 16), Replay())
    is_best = torch.zeros(16, 64, dtype=torch.bool).scatter_(1, depth.best_BC, True)
    assert (depth.predicted_BS == is_best).float().mean() > 0.93
    assert depth.predicted_BS.float().mean() == pytest.approx(1 / 8, abs=0.04)


def test_evaluation_is_causal_and_training_is_not() -> None:
    model, batch = built(model__num_layers=4), tokens(1, 12)
    for cut in (3, 7, 11):
        changed = batch.tokens_BS.clone()
        changed[0, cut:] = (changed[0, cut:] + 1) % VOCAB
        with torch.no_grad():
            model.eval()
            before, after = model.logits(batch.tokens_BS), model.logits(changed)
            assert torch.equal(before, model.logits(batch.tokens_BS))
            torch.testing.assert_close(before[0, :cut], after[0, :cut], rtol=1e-5, atol=1e-6)
            assert not torch.allclose(before[0, cut:], after[0, cut:])
    model, (x_BSD, tokens_BS) = built(), inputs()
    chosen, gate_D = through_by_hand(routed(model), x_BSD[0]), routed(model).depth.gate[0].detach()
    assert 11 not in chosen
    worst = min(chosen, key=lambda position: float(x_BSD[0, position] @ gate_D))
    pushed_BSD = x_BSD.clone()
    pushed_BSD[0, 11] = 9 * gate_D
    before, after = (call(model, x, tokens_BS).hidden_BSD[0, worst] for x in (x_BSD, pushed_BSD))
    assert not torch.allclose(before, x_BSD[0, worst])
    assert torch.equal(after, x_BSD[0, worst]), "the last token pushed it out"


@pytest.mark.parametrize("changes", [{}, DENSE, {"model__depth_every": 1}])
def test_nobody_goes_through_in_evaluation(changes: dict[str, Any]) -> None:
    """Then x stays x, and the router losses are those of the layers that saw tokens."""
    model, (x_BSD, tokens_BS) = built(**changes).eval(), inputs()
    first: list[LossTerms] = []
    model.blocks[0].register_forward_hook(lambda _, __, output: first.append(output.losses))
    with torch.no_grad():
        for block in model.blocks:
            if isinstance(block, DepthBlock):
                block.depth.predictor_bias.fill_(-1e4)
        assert torch.equal(model.blocks[1](x_BSD, tokens_BS, model.rotary, None, Replay()).hidden_BSD, x_BSD)
        out = model(tokens(2, 12))
    expected = LossTerms.zeros(CPU) if first[0] is None else first[0]
    assert dataclasses.replace(out.losses, depth=expected.depth) == expected
    assert math.isfinite(out.loss.item())


def test_recompute_keeps_the_choice_and_changes_nothing() -> None:
    gradients = []
    for recompute in (False, True):
        model = built(engine__recompute=recompute)
        model(tokens(2, 12)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0)
    model, (x_BSD, tokens_BS), replay = built(), inputs(), Replay()
    decided_BC = torch.tensor([[0, 1, 2, 3]] * 2)
    replay.once("depth", lambda: decided_BC)
    out = routed(model)(x_BSD, tokens_BS, model.rotary, None, replay).hidden_BSD
    assert (out != x_BSD).any(-1).nonzero()[:, 1].tolist() == [0, 1, 2, 3] * 2


def test_time_is_charged_to_the_phases_of_a_block() -> None:
    timeline = Timeline(CPU)
    model = Decoder(tiny(dispatch="local", **{**DEPTH, "model__depth_every": 1}), alone(), VOCAB, timeline)
    model(tokens(2, 12)).loss.backward()
    assert {"attention", "route", "experts", "combine"} <= set(timeline.drain())
