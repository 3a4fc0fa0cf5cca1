"""What every router of conf/router must do, whatever its method: a new file there is tested by being there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from moetrain.compose import conf_folder, options
from moetrain.models.decoder import Decoder
from moetrain.moe.layer import MoELayer
from moetrain.moe.replay import Replay
from moetrain.moe.routers.base import StepSeen
from moetrain.ops.slots import count_experts
from moetrain.types import RouterInput, Routing
from tests.catalog import ROUTERS, tiny_with, traits
from tests.tiny import VOCAB, alone, ids, moe_layer, tokens

TOKENS, DIM, EXPERTS = 32, 16, 8
PRIORITIES = ("choice_major", "token_major", "probs", "batch_prioritised", "random")
every_router = pytest.mark.parametrize("name", ROUTERS)


def layer_of(name: str, **changes: Any) -> MoELayer:
    return moe_layer(tiny_with(name, dispatch="local", **changes))


def input_of(seed: int = 0, num_tokens: int = TOKENS) -> RouterInput:
    """Two sequences of tokens with a mean, as a norm before the router would leave them."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(num_tokens, DIM, generator=generator) + 0.1
    return RouterInput(x_TD, torch.randint(0, VOCAB, (2, num_tokens // 2), generator=generator))


def route(layer: MoELayer, given: RouterInput, replay: Replay | None = None) -> Routing:
    """With the same random numbers every time."""
    torch.manual_seed(1)
    routing: Routing = layer.router(given, replay or Replay())
    return routing


def valid(routing: Routing) -> Tensor:
    return torch.ones_like(routing.expert_TK, dtype=torch.bool) if routing.valid_TK is None else routing.valid_TK


def sets_of(routing: Routing) -> list[frozenset[int]]:
    """The experts of each token."""
    rows = zip(routing.expert_TK.tolist(), valid(routing).tolist(), strict=True)
    return [frozenset(e for e, counts in zip(*row, strict=True) if counts) for row in rows]


def buffers(layer: MoELayer) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


@every_router
def test_it_says_where_it_comes_from(name: str) -> None:
    about = OmegaConf.load(conf_folder() / "router" / f"{name}.yaml").get("_about_")
    assert about is not None
    assert len(about.paper) > 10
    assert about.balance in options("balance")


@every_router
@pytest.mark.parametrize("training", [True, False])
def test_ids_weights_and_probabilities(name: str, training: bool) -> None:
    layer = layer_of(name).train(training)
    for seed in range(3):
        routing = route(layer, input_of(seed))
        num_tokens, top_k = routing.expert_TK.shape
        assert (num_tokens, routing.expert_TK.dtype) == (TOKENS, torch.int64)
        assert routing.logits_TE.shape == routing.probs_TE.shape == (TOKENS, EXPERTS)
        assert {routing.logits_TE.dtype, routing.probs_TE.dtype, routing.weight_TK.dtype} == {torch.float32}
        assert int(routing.expert_TK.min()) >= 0
        assert int(routing.expert_TK.max()) < EXPERTS
        assert all(len(set(row)) == top_k for row in routing.expert_TK.tolist()), "distinct"
        assert torch.isfinite(routing.weight_TK).all()
        assert (routing.weight_TK >= 0).all()
        assert (routing.weight_TK[~valid(routing)] == 0).all()
        torch.testing.assert_close(routing.probs_TE.sum(-1), torch.ones(TOKENS))
        assert routing.identity_T is None or routing.identity_T.shape == (TOKENS,)


@every_router
def test_invalid_choices_come_last_and_only_where_k_is_ragged(name: str) -> None:
    for training in (True, False):
        routing = route(layer_of(name).train(training), input_of())
        assert (valid(routing).int().diff(dim=1) <= 0).all()
        assert traits(name).ragged or valid(routing).all()


@every_router
def test_the_language_loss_reaches_every_parameter(name: str) -> None:
    """TRAPS T13: also without any balance loss; x gets its gradient too."""
    layer, given = layer_of(name), input_of()
    x_TD = given.x_TD.requires_grad_()
    torch.manual_seed(1)
    layer(x_TD, given.tokens_BS, Replay()).hidden_TD.square().sum().backward()
    for parameter_name, parameter in layer.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
        assert parameter.grad.abs().sum() > 0 or parameter_name.startswith("experts."), parameter_name
    assert x_TD.grad is not None


@every_router
@pytest.mark.parametrize(("factor", "priority"), [(None, "choice_major"), *((0.5, name) for name in PRIORITIES)])
def test_capacity_conserves(name: str, factor: float | None, priority: str) -> None:
    """kept + dropped = assigned; slots of an expert are distinct and below its capacity."""
    layer = layer_of(name, capacity__factor_train=factor, capacity__minimum=1, capacity__priority=priority)
    placement = layer.capacity(route(layer, input_of()), 2, Replay())
    routing = placement.routing
    layer.load.record(placement)
    layer.load.commit()
    assigned_E, kept_E = layer.load.take()
    dropped_E = count_experts(routing.expert_TK, EXPERTS, valid(routing) & ~placement.kept_TK)
    assert torch.equal(assigned_E, kept_E + dropped_E)
    assert int(assigned_E.sum()) == int(valid(routing).sum())
    assert not (placement.kept_TK & ~valid(routing)).any()
    taken = list(
        zip(routing.expert_TK[placement.kept_TK].tolist(), placement.slot_TK[placement.kept_TK].tolist(), strict=True)
    )
    assert len(set(taken)) == len(taken)
    if placement.capacity is None:
        assert torch.equal(assigned_E, kept_E)
    else:
        assert all(0 <= slot < placement.capacity for _, slot in taken)


@every_router
def test_evaluation_is_deterministic_and_leaves_no_trace(name: str) -> None:
    layer, given = layer_of(name).eval(), input_of()
    before = buffers(layer)
    with torch.no_grad():
        first = layer(given.x_TD, given.tokens_BS, Replay()).hidden_TD
        second = layer(given.x_TD, given.tokens_BS, Replay()).hidden_TD
    assert torch.equal(first, second), "TRAPS T12: no noise in evaluation"
    assert all(torch.equal(before[key], value) for key, value in buffers(layer).items())
    assert not layer.load.pending_2E.any()


@every_router
def test_forward_moves_no_buffer_and_adjust_does(name: str) -> None:
    layer, given = layer_of(name), input_of()
    before = buffers(layer)
    layer(given.x_TD, given.tokens_BS, Replay())
    assert all(torch.equal(before[key], value) for key, value in buffers(layer).items())
    layer.commit()
    if layer.router.adapts:
        counts_LE, statistics_LS = layer.load.pending_2E[:1], layer.observed.take().unsqueeze(0)
        layer.router.adjust(StepSeen(0, counts_LE, statistics_LS, 1))
        assert any(not torch.equal(before[key], value) for key, value in buffers(layer).items())
    for key, value in buffers(layer).items():
        assert value.dtype in (torch.float32, torch.int64), key


@every_router
def test_a_skipped_step_moves_no_buffer(name: str) -> None:
    """Nor does what it saw count in the next step, which ends as if it were the first."""
    model, fresh = (Decoder(tiny_with(name, dispatch="local"), alone(), VOCAB) for _ in range(2))
    before = {key: buffer.clone() for key, buffer in model.named_buffers()}
    for both, seed, moved in ((False, 0, False), (True, 1, True)):
        for decoder in (model, fresh) if both else (model,):
            torch.manual_seed(seed)
            decoder(tokens(2, 16, seed))
            decoder.commit_load()
            decoder.adapt_routers(moved=moved)
            decoder.take_load()
        if not moved:
            for key, buffer in model.named_buffers():
                assert torch.equal(buffer, before[key]), key
            assert all(layer.observed.num == 0 for layer in model.moe_layers())
    for (key, ours), (_, wanted) in zip(model.named_buffers(), fresh.named_buffers(), strict=True):
        assert torch.equal(ours, wanted), key


@every_router
def test_a_replayed_choice_stands(name: str) -> None:
    """TRAPS 6: recompute may round otherwise, and must choose alike."""
    layer, replay = layer_of(name), Replay()
    first = route(layer, input_of(0), replay)
    again = route(layer, RouterInput(input_of(1).x_TD, input_of(0).tokens_BS), replay)
    assert torch.equal(first.expert_TK, again.expert_TK)
    assert torch.equal(valid(first), valid(again))


@every_router
@pytest.mark.parametrize("training", [True, False])
def test_it_is_as_causal_as_it_says(name: str, training: bool) -> None:
    """Other tokens at the end of each sequence: whoever stands before them must not notice, unless declared."""
    layer, noticed = layer_of(name).train(training), False
    says = traits(name).causal_train if training else traits(name).causal_eval
    kept = torch.arange(TOKENS).view(2, -1)[:, :10].flatten()
    for seed in range(8):
        given, other = input_of(seed), input_of(seed + 100)
        x_TD, tokens_BS = other.x_TD.clone(), other.tokens_BS.clone()
        x_TD[kept], tokens_BS[:, :10] = given.x_TD[kept], given.tokens_BS[:, :10]
        before, after = route(layer, given), route(layer, RouterInput(x_TD, tokens_BS))
        same_sets = [sets_of(before)[t] == sets_of(after)[t] for t in kept.tolist()]
        noticed |= not all(same_sets)
        if all(same_sets) and says:
            torch.testing.assert_close(before.weight_TK[kept], after.weight_TK[kept], rtol=1e-5, atol=1e-6)
    assert noticed != says


@every_router
def test_it_reads_token_ids_if_it_says_so(name: str) -> None:
    layer, given = layer_of(name).eval(), input_of()
    other = RouterInput(given.x_TD, (given.tokens_BS + 1) % VOCAB)
    assert (sets_of(route(layer, given)) != sets_of(route(layer, other))) == traits(name).needs_tokens


@every_router
def test_noise_is_there_in_training_if_it_says_so(name: str) -> None:
    layer, given = layer_of(name), input_of()
    first = layer.router(given, Replay())
    draws = [layer.router(given, Replay()) for _ in range(5)]
    varies = any(not torch.equal(first.weight_TK, draw.weight_TK) for draw in draws)
    assert varies == (traits(name).noise != "none")


@every_router
@pytest.mark.parametrize("training", [True, False])
def test_odd_inputs(name: str, training: bool) -> None:
    """No token at all, one token, all alike, zeros: finite numbers, and gradients that are zeros rather than None."""
    for num_tokens, scale in ((0, 1.0), (2, 1.0), (TOKENS, 0.0)):
        layer = layer_of(name).train(training)
        x_TD = input_of(num_tokens=num_tokens).x_TD * scale
        out = layer(x_TD, ids(x_TD, 2), Replay())
        assert out.hidden_TD.shape == (num_tokens, DIM)
        assert torch.isfinite(out.hidden_TD).all()
        assert all(torch.isfinite(value) for value in out.losses.named().values()), out.losses
        if training:
            (out.hidden_TD.sum() + sum(out.losses.named().values())).backward()
            layer.commit()
            for key, parameter in layer.named_parameters():
                assert parameter.grad is not None, key
                assert torch.isfinite(parameter.grad).all(), key
                assert num_tokens > 0 or not parameter.grad.any(), key


@every_router
def test_half_precision_tokens(name: str) -> None:
    """TRAPS 10: the router reckons in fp32 whatever it is given."""
    layer, given = layer_of(name), input_of()
    routing = route(layer, RouterInput(given.x_TD.bfloat16(), given.tokens_BS))
    assert routing.logits_TE.dtype == routing.weight_TK.dtype == torch.float32
