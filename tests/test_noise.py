"""Noise of a router: there in training, of the size that was asked for, and nothing in evaluation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from moetrain.moe.replay import Replay
from tests.tiny import seen
from tests.token_choice import COUNTS, NUM_EXPERTS, routed, router, step

NOISES: list[dict[str, Any]] = [
    {"noise": "jitter", "noise_scale": 0.3},
    {"noise": "gaussian", "noise_scale": 0.3},
    {"noise": "learned"},
    {"noise": "gumbel", "noise_scale": 1.0},
    {"noise": "warmup", "noise_steps": 4},
]


@pytest.mark.parametrize("own", NOISES, ids=str)
def test_trap_t12_noise_in_training_and_none_in_eval(own: dict[str, Any]) -> None:
    made, plain = router(**own), router()
    x_TD = torch.randn(64, 6)
    kept = x_TD.clone()
    first, second = made(seen(x_TD), Replay()), made(seen(x_TD), Replay())
    assert not torch.equal(first.logits_TE, second.logits_TE)
    assert not torch.equal(first.expert_TK, second.expert_TK)
    made.eval()
    assert torch.equal(made(seen(x_TD), Replay()).logits_TE, plain(seen(x_TD), Replay()).logits_TE)
    assert torch.equal(x_TD, kept), "jitter must not leak into what the experts see"


def test_sizes_of_the_noise() -> None:
    """Deviations of many draws: of the gaussian its scale, of learned softplus(0) = ln 2, of gumbel pi / sqrt 6."""
    for own, std, mean in (
        ({"noise": "gaussian", "noise_scale": 0.3}, 0.3, 0.0),
        ({"noise": "learned"}, math.log(2), 0.0),
        ({"noise": "gumbel", "noise_scale": 2.0}, 2 * math.pi / math.sqrt(6), 2 * 0.5772),
    ):
        made = router(**own)
        noise_TE = routed(made, 20_000).logits_TE - routed(made.eval(), 20_000).logits_TE
        assert noise_TE.std().item() == pytest.approx(std, rel=0.02)
        assert noise_TE.mean().item() == pytest.approx(mean, abs=0.03)


def test_gumbel_of_scale_one_draws_the_first_choice_from_the_softmax() -> None:
    made = router(top_k=1, noise="gumbel", noise_scale=1.0)
    x_TD = torch.randn(1, 6).expand(40_000, 6)
    first = made(seen(x_TD), Replay()).expert_TK[:, 0]
    share_E = torch.zeros(NUM_EXPERTS).index_add(0, first, torch.ones(40_000)) / 40_000
    torch.testing.assert_close(share_E, (x_TD[0] @ made.gate.t()).softmax(-1), atol=0.01, rtol=0)


def test_learned_noise_gets_a_gradient() -> None:
    made = router(noise="learned")
    routed(made).weight_TK[:, 0].sum().backward()
    assert made.noise.gate.grad is not None
    assert made.noise.gate.grad.abs().sum() > 0


def test_warmup_moves_from_random_to_the_logits() -> None:
    made = router(noise="warmup", noise_steps=4)
    clean_TE = routed(router().eval(), 4000).logits_TE
    for share in (0.25, 0.5, 0.75, 1.0, 1.0):
        logits_TE = routed(made, 4000).logits_TE
        rest_TE = logits_TE - share * clean_TE
        if share == 1.0:
            assert torch.equal(logits_TE, clean_TE)
        else:
            assert rest_TE.std().item() == pytest.approx((1 - share) * made.noise.std.item(), rel=0.03)
            assert rest_TE.mean().item() == pytest.approx((1 - share) * made.noise.mean.item(), abs=0.02)
        step(made, COUNTS, 3 * made.statistics(), num=3)
        assert made.noise.std.item() == pytest.approx(clean_TE.std(correction=0).item(), rel=1e-4)
        assert made.noise.mean.item() == pytest.approx(clean_TE.mean().item(), rel=1e-3, abs=1e-5)
    assert made.noise.num_steps.item() == 5


def test_warmup_remembers_what_it_saw() -> None:
    made = router(noise="warmup", noise_steps=4)
    step(made, COUNTS, torch.tensor([10.0, 50.0, 10.0], dtype=torch.float64))
    assert (made.noise.mean.item(), made.noise.std.item()) == (1.0, 2.0)
    step(made, COUNTS, torch.tensor([20.0, 50.0, 10.0], dtype=torch.float64))
    assert made.noise.mean.item() == pytest.approx(0.9 * 1 + 0.1 * 2)
    assert made.noise.std.item() == pytest.approx(0.9 * 2 + 0.1 * 1)
