"""The gradient ratio against autograd; measuring it leaves no trace."""

from __future__ import annotations

import pytest
import torch

from moetrain.compose import compose
from moetrain.models.decoder import Decoder
from moetrain.monitor.gradient_ratio import gradient_ratios
from moetrain.types import ConfigError
from tests.tiny import ROUTER, VOCAB, alone, tiny, tokens


def test_the_ratio_is_that_of_two_gradients() -> None:
    config = tiny(balance__scope="micro_batch", model__first_dense=1, model__num_layers=3)
    model, batch = Decoder(config, alone(), VOCAB), tokens(2, 16)
    ratios = gradient_ratios(model, batch)
    gate = model.moe_layers()[1].router.gate
    output = model(batch)
    (aux,) = torch.autograd.grad(0.1 * output.losses.balance, gate, retain_graph=True)
    (lm,) = torch.autograd.grad(output.lm, gate)
    assert ratios["moe/layer_02/aux_gradient_ratio"] == pytest.approx((aux.norm() / lm.norm()).item(), rel=1e-5)
    assert set(ratios) == {f"{where}/aux_gradient_ratio" for where in ("moe/layer_01", "moe/layer_02", "balance")}
    assert ratios["balance/aux_gradient_ratio"] == max(ratios.values())


def test_measuring_leaves_no_trace() -> None:
    noisy = tiny(router={**ROUTER, "noise": "gaussian"})
    model, batch = Decoder(noisy, alone(), VOCAB), tokens(2, 16)
    torch.manual_seed(3)
    gradient_ratios(model, batch)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))
    assert all(param.grad is None for param in model.parameters())
    model(batch)
    model.commit_load()
    assert model.take_load().assigned_LE.sum().item() == 2 * 2 * 16 * 2  # layers, k, tokens: counted once


def test_without_router_losses_nothing_pulls_and_without_weights_nothing_is_measured() -> None:
    config = tiny(balance__balance_coef=0.0, balance__z_coef=0.1)
    assert set(gradient_ratios(Decoder(config, alone(), VOCAB), tokens(2, 16)).values()) == {0.0}
    by_token = tiny(router={"_target_": "moetrain.moe.routers.hash.HashRouter"})
    assert gradient_ratios(Decoder(by_token, alone(), VOCAB), tokens(2, 16)) == {}


@pytest.mark.parametrize(
    ("every", "zero_stage", "fix"), [(10, 3, "zero_stage=2"), (15, 2, "every=10"), (3, 0, "every=10")]
)
def test_what_can_not_be_measured_is_refused(every: int, zero_stage: int, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([f"monitor.gradient_ratio_every={every}", f"engine.zero_stage={zero_stage}"], 1, None)
    (problem,) = caught.value.problems
    assert problem.field == "monitor.gradient_ratio_every"
    assert fix in problem.fix
