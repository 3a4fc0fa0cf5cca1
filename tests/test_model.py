"""The decoder: its loss, its counts, recompute, document masks, and the traps of counting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moetrain.engine import make_engine
from moetrain.models.attention import document_mask
from moetrain.models.counts import size_report
from moetrain.models.decoder import Decoder
from moetrain.models.generate import generate
from moetrain.types import Batch
from tests.tiny import VOCAB, alone, tiny, tokens


def built(**changes: Any) -> Decoder:
    return Decoder(tiny(dispatch="local", **changes), alone(), VOCAB)


def gradients(model: Decoder, batch: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__tied_embeddings": False, "model__qk_norm": "full"},
        {"model__qk_norm": "head", "model__moe_every": 2, "model__num_layers": 3, "experts__num_shared": 2},
        {"model__first_dense": 1, "router__noise": "learned"},
    ],
)
def test_counts_from_the_config_equal_the_built_module(changes: dict[str, Any]) -> None:
    model = built(**changes)
    report = size_report(model.config, VOCAB)
    assert report.total == sum(p.numel() for p in model.parameters())
    routed = sum(p.numel() for name, p in model.named_parameters() if name in model.expert_names())
    assert report.routed == routed
    assert report.active == report.total - routed + routed * 2 // 8


def test_flops_are_those_that_torch_counts() -> None:
    """A forward under torch's counter, every slot filled; it counts the whole square of attention, here half of it."""
    model = Decoder(tiny(dispatch="padded", capacity__factor_train=1.0, capacity__minimum=1), alone(), VOCAB)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(tokens(2, 16))
    m = model.config.model
    other_half = m.num_layers * 2 * m.num_heads * m.head_dim * m.context
    forward = size_report(model.config, VOCAB).flops_per_token / 3
    assert counter.get_total_flops() / 32 == pytest.approx(forward + other_half)


def test_initial_loss_is_about_uniform_and_training_lowers_it() -> None:
    model, batch = built(model__init_std=0.02), tokens(4, 16)
    first = model(batch).lm.item()
    assert first == pytest.approx(torch.tensor(float(VOCAB)).log().item(), abs=0.1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimiser.zero_grad()
        model(batch).loss.backward()
        optimiser.step()
    assert model(batch).lm.item() < first - 1


def test_loss_is_the_sum_of_its_terms() -> None:
    out = built()(tokens(2, 16))
    expected = out.lm + 0.1 * out.losses.balance + 0.01 * out.losses.z
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("noise", ["none", "gaussian"])
def test_trap06_recompute_gives_the_same_gradients_and_trap05_counts_once(noise: str) -> None:
    batch, found = tokens(3, 16), []
    for recompute in (False, True):
        model = built(engine__recompute=recompute, router__noise=noise, router__noise_scale=1.0)
        torch.manual_seed(0)
        found.append(gradients(model, batch))
        model.commit_load()
        load = model.take_load()
        assert load.assigned_LE.dtype == torch.int64
        assert load.assigned_LE.sum(1).tolist() == [3 * 16 * 2] * 2
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=0)


def test_trap04_eval_leaves_no_trace_in_the_counts() -> None:
    model, batch = built(), tokens(2, 16)
    model(batch)
    model.commit_load()
    model.eval()
    model(batch)
    model.train()
    assert model.take_load().assigned_LE.sum(1).tolist() == [64, 64]
    assert model.take_load().assigned_LE.sum().item() == 0


def test_eval_twice_is_bit_equal_with_noise_configured() -> None:
    model = built(router__noise="jitter", router__noise_scale=0.5).eval()
    batch = tokens(2, 16)
    assert torch.equal(model(batch).loss, model(batch).loss)


def test_tokens_do_not_see_the_future() -> None:
    """Dropless, so that nothing but attention could leak."""
    model = built().eval()
    batch = tokens(1, 16)
    changed = batch.tokens_BS.clone()
    changed[0, 10] = (changed[0, 10] + 1) % VOCAB
    before, after = model.logits(batch.tokens_BS), model.logits(changed)
    torch.testing.assert_close(before[0, :10], after[0, :10], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(before[0, 10:], after[0, 10:])


def test_packed_documents_do_not_see_each_other() -> None:
    model = built().eval()
    first, second = tokens(1, 16, seed=1), tokens(1, 16, seed=2)
    document_BS = torch.tensor([[0] * 8 + [1] * 8])
    packed = torch.cat([first.tokens_BS[:, :8], second.tokens_BS[:, :8]], dim=1)
    hidden, _ = model._hidden(packed, document_mask(document_BS))
    changed = torch.cat([(first.tokens_BS[:, :8] + 1) % VOCAB, second.tokens_BS[:, :8]], dim=1)
    other, _ = model._hidden(changed, document_mask(document_BS))
    torch.testing.assert_close(hidden[:, 8:], other[:, 8:], rtol=1e-5, atol=1e-6)
    whole, _ = model._hidden(changed, None)
    assert not torch.allclose(hidden[:, 8:], whole[:, 8:])


def test_generation_continues_a_prompt_and_repeats_itself() -> None:
    engine = make_engine(tiny(dispatch="local"), built(), alone(), 1)
    prompt_S = torch.tensor([1, 2, 3])
    one, two = (generate(engine.logits, 16, prompt_S, 20, 0.8, seed=3) for _ in range(2))
    assert one.shape == (23,)
    assert torch.equal(one, two)
    assert torch.equal(one[:3], prompt_S)
    assert engine.model.training
    greedy = generate(engine.logits, 16, prompt_S, 1, 0.0, seed=0)[-1]
    assert greedy == engine.logits(prompt_S.unsqueeze(0))[0, -1].argmax()
