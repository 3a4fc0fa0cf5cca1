"""The plan of a rank's memory against what a real step has alive, counted operation by operation on two ranks."""

from __future__ import annotations

import gc

import pytest
import torch

from moetrain.checks import ep_size_of, fitted
from moetrain.compose import compose
from moetrain.engine import make_engine
from moetrain.models.decoder import Decoder
from moetrain.ops.high_water import HighWater
from moetrain.ops.kernels import make_kernels
from moetrain.parallel.mesh import mesh_of_world
from moetrain.plan import dry_run, make_plan
from moetrain.types import Batch
from tests.ranks import run_ranks

WORDS = (
    "recipe=quickstart model.num_layers=2 model.dim=64 model.num_heads=2 model.num_kv_heads=1 model.expert_dim=128"
    " model.context=64 train.micro_batch=4 machine.device=cpu"
)


def alive(rank: int, world: int, words: list[str]) -> tuple[int, int]:
    """Bytes between steps, and the most within the second step."""
    config = fitted(compose(words, world), world)
    mesh = mesh_of_world(ep_size_of(config, world), torch.device("cpu"))
    accumulation = config.train.global_batch // (world * config.train.micro_batch)
    with HighWater("cpu") as water:
        model = Decoder(config, mesh, 512, kernels=make_kernels(mesh.device, "torch"))
        engine = make_engine(config, model, mesh, accumulation)
        for _ in range(2):
            gc.collect()
            water.most = water.now
            for _ in range(accumulation):
                tokens_BS = torch.randint(0, 512, (config.train.micro_batch, config.model.context))
                engine.forward_backward(Batch(tokens_BS, tokens_BS))
            engine.step(1e-3)
        gc.collect()
        return water.now, water.most


@pytest.mark.parametrize(
    ("zero_stage", "dtype", "global_batch"),
    [
        (0, "fp32", 8),
        (0, "fp32", 16),
        (1, "fp32", 8),
        (1, "fp32", 16),
        (1, "bf16", 8),
        (2, "fp32", 16),
        (2, "bf16", 8),
        (2, "bf16", 16),
        (3, "fp32", 8),
    ],
)
def test_the_plan_is_what_a_step_has_alive(zero_stage: int, dtype: str, global_batch: int) -> None:
    words = [*WORDS.split(), f"engine.zero_stage={zero_stage}", f"train.global_batch={global_batch}"]
    words += [f"engine.dtype={dtype}"]
    config = compose(words, 2)
    memory, activations = make_plan(config, 2).memory, dry_run(config, 2).activations
    for between, most in run_ranks(2, alive, words):
        assert between == pytest.approx(memory.state, rel=0.05 if zero_stage == 3 else 0.02)
        assert most == pytest.approx(memory.peak(activations), rel=0.1)


def test_a_step_that_is_fuller_than_forward_and_backward() -> None:
    """ZeRO 2 in bf16 with few activations: gradients twice and Adam's work."""
    words = [*WORDS.split(), "engine.zero_stage=2", "engine.dtype=bf16", "model.expert_dim=256"]
    words += ["train.micro_batch=1", "train.global_batch=2"]
    config = compose(words, 2)
    memory, activations = make_plan(config, 2).memory, dry_run(config, 2).activations
    assert memory.reduction > activations
    for _, most in run_ranks(2, alive, words):
        assert most == pytest.approx(memory.peak(activations), rel=0.1)
