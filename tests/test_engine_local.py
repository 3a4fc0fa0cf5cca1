"""The local engine against torch written out, and what every engine decides by shared code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from moetrain.config import EngineConfig
from moetrain.engine.base import ExpertWatch, parameter_groups
from moetrain.parallel.mesh import Mesh, weight_dtype
from tests.engine_runs import CPU, ONE, Case, Run, engine_of, train, weights_of
from tests.toy import Toy, batch_of, sequences, toy_config


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_it_is_torch_written_out(optim: str) -> None:
    """Two micro-batches, gradients averaged, clipped as one vector, no decay of vectors."""
    engine = engine_of(Case("local", accumulation=2, optim=optim), ONE)
    run = train(engine, ONE, 2, range(3), Run())

    model, options = Toy(ONE), toy_config("local", optim=optim).optim
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    kinds = {"sgd": torch.optim.SGD(groups, lr=1.0), "adamw": torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-3)}
    for step in range(3):
        output = model(batch_of(sequences(step, 16)))
        model.zero_grad()
        output.loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in kinds[optim].param_groups:
            group["lr"] = 0.1 * (step + 1)
        kinds[optim].step()
        for layer in model.moe_layers():
            layer.router.bias_E.add_(0.01 * torch.arange(8.0))
        assert run.losses[step] == pytest.approx(output.loss.item(), rel=1e-6)
        assert run.norms[step] == pytest.approx(norm.item(), rel=1e-6)
    got = weights_of(engine)
    for name, wanted in model.named_parameters():
        np.testing.assert_allclose(got[name], wanted.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_without_a_clip_norm_nothing_is_clipped() -> None:
    from moetrain.engine.local import LocalEngine

    free, huge = (LocalEngine(toy_config("local", clip_norm=clip), Toy(ONE), ONE, 1) for clip in (None, 1e9))
    for engine in (free, huge):
        train(engine, ONE, 1, range(2), Run())
    for name, wanted in weights_of(huge).items():
        assert np.array_equal(weights_of(free)[name], wanted)


def test_evaluate_has_no_gradient_and_leaves_train_mode_on() -> None:
    engine = engine_of(Case("local"), ONE)
    modes = []
    engine.model.register_forward_hook(lambda module, *_: modes.append((module.training, torch.is_grad_enabled())))
    engine.evaluate(batch_of(sequences(0, 2)))
    engine.forward_backward(batch_of(sequences(0, 2)))
    assert modes == [(False, False), (True, True)]


def test_bf16_weights_have_fp32_masters_gradients_and_buffers() -> None:
    engine = engine_of(Case("local", dtype="bf16", optim="adamw"), ONE)
    engine.forward_backward(batch_of(sequences(0, 2)))
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
    assert {p.grad.dtype for p in engine.model.parameters() if p.grad is not None} == {torch.float32}
    assert {b.dtype for b in engine.model.buffers()} == {torch.float32}
    engine.step(0.1)
    assert {piece.values_X.dtype for piece in engine.state().held} == {torch.float32}


def test_groups_hold_every_parameter_once_and_experts_apart_under_ep() -> None:
    model = Toy(ONE)
    for ep_size, names in ((1, ["dense.decay", "dense.plain"]), (2, ["dense.decay", "dense.plain", "expert.decay"])):
        groups = parameter_groups(model, ep_size)
        assert [group.name for group in groups] == names
        ids = [id(p) for group in groups for p in group.params.values()]
        assert sorted(ids) == sorted(id(p) for p in model.parameters())
        assert all(p.dim() > 1 for group in groups if group.decays for p in group.params.values())


def test_auto_dtype_is_bf16_on_an_accelerator_only() -> None:
    assert weight_dtype(EngineConfig(), torch.device("cpu")) == torch.float32
    assert weight_dtype(EngineConfig(), torch.device("cuda")) == torch.bfloat16
    assert weight_dtype(EngineConfig(dtype="fp32"), torch.device("cuda")) == torch.float32


def test_trap14_an_expert_left_out_of_backward_is_an_assertion() -> None:
    model = Toy(ONE)
    watch = ExpertWatch(model)
    model(batch_of(sequences(0, 2))).loss.backward()
    watch.check()
    layer = model.moe_layers()[1]
    layer.forward = lambda x_TD: type(layer).forward(model.moe_layers()[0], x_TD)
    model(batch_of(sequences(0, 2))).loss.backward()
    with pytest.raises(AssertionError, match=r"moe\.1\.experts"):
        watch.check()


def test_step_without_all_micro_batches_is_an_assertion() -> None:
    engine = engine_of(Case("local", accumulation=2), ONE)
    engine.forward_backward(batch_of(sequences(0, 2)))
    with pytest.raises(AssertionError):
        engine.step(0.1)


def test_a_norm_that_is_not_finite_is_returned_and_changes_nothing() -> None:
    engine = engine_of(Case("local"), ONE)
    before = weights_of(engine)
    engine.model.fault = float("inf")
    engine.forward_backward(batch_of(sequences(0, 2)))
    assert not math.isfinite(engine.step(0.1))
    assert all(np.array_equal(value, before[name]) for name, value in weights_of(engine).items())


def test_replicas_share_out_what_they_write() -> None:
    """Four ranks in two groups of experts: of every tensor every element is written exactly once, evenly."""
    seen: dict[str, list[int]] = {}
    sizes = []
    for rank in range(4):
        engine = engine_of(Case("local", ep_size=2, optim="adamw"), Mesh(rank, 4, 2, CPU))
        state = engine.state()
        sizes.append(sum(piece.values_X.numel() for piece in state.shares))
        for piece in state.shares:
            seen.setdefault(piece.key, []).extend(range(piece.start, piece.start + piece.values_X.numel()))
    assert seen.keys() == state.tensors.keys()
    for key, spec in state.tensors.items():
        assert sorted(seen[key]) == list(range(spec.num_values)), key
    assert max(sizes) - min(sizes) < 30


def test_a_group_knows_its_parameters_by_the_names_of_the_model() -> None:
    model = Toy(ONE)
    named = {name: p for group in parameter_groups(model, 2) for name, p in group.params.items()}
    assert named == dict(model.named_parameters())
