"""Runs of the toy model under an engine, on one process or as one rank of many, and what they are compared by."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moetrain.checkpoint import Keep, SavedBy, Saver, find
from moetrain.engine import Engine, make_engine
from moetrain.parallel.mesh import Mesh, mesh_of_world
from tests.toy import Toy, batch_of, sequences, toy_config

CPU = torch.device("cpu")
ONE = Mesh(0, 1, 1, CPU)
NUM_SEQUENCES = 16


@dataclass(frozen=True)
class Case:
    """What to run. ``skew`` sends every token to experts 0 and 1; ``aux_only`` leaves the language loss out."""

    engine: str
    zero_stage: int = 0
    ep_size: int = 1
    accumulation: int = 1
    dtype: str = "fp32"
    optim: str = "sgd"
    skew: bool = False
    aux_only: bool = False

    @property
    def name(self) -> str:
        engine = self.engine if self.engine == "local" else f"zero{self.zero_stage}"
        extra = "-skew" * self.skew + "-aux" * self.aux_only
        return f"{engine}-ep{self.ep_size}-accumulation{self.accumulation}-{self.dtype}-{self.optim}{extra}"


@dataclass
class Run:
    """Mean losses over the world, reported norms, numbers of eval mode (a loss, a logit), and this rank's weights."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    evals: list[tuple[float, float]] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)


def engine_of(case: Case, mesh: Mesh) -> Engine:
    config = toy_config(case.engine, case.zero_stage, dtype=case.dtype, optim=case.optim)
    model = Toy(mesh, lm_coef=0.0 if case.aux_only else 1.0)
    if case.skew:
        for layer in model.moe_layers():
            layer.router.bias_E.copy_(torch.tensor([60.0, 40.0, 0, 0, 0, 0, 0, 0]))
    return make_engine(config, model, mesh, case.accumulation)


def train(engine: Engine, mesh: Mesh, accumulation: int, steps: range, run: Run) -> Run:
    """The same global batch whatever the layout; the learning rate and the routers' buffer move from step to step."""
    for step in steps:
        rows = sequences(step, NUM_SEQUENCES).view(accumulation, mesh.world_size, -1, sequences(step, 1).shape[1])
        loss = torch.zeros(())
        for micro in range(accumulation):
            loss += engine.forward_backward(batch_of(rows[micro, mesh.rank])).loss / accumulation
        if mesh.world_group is not None:
            dist.all_reduce(loss)
        run.losses.append(float(loss) / mesh.world_size)
        run.norms.append(engine.step(0.1 * (step + 1)))
        tokens = batch_of(sequences(99, 2))  # the same on every rank
        run.evals.append((float(engine.evaluate(tokens).lm), float(engine.logits(tokens.tokens_BS)[-1, -1, 0])))
        for layer in engine.model.moe_layers():
            layer.router.bias_E.add_(0.01 * torch.arange(8.0))
    return run


def weights_of(engine: Engine) -> dict[str, np.ndarray]:
    """This rank's weights as the model sees them; at ZeRO 3 they are fetched first."""
    params = dict(engine.model.named_parameters())
    if not any(hasattr(p, "ds_id") for p in params.values()):
        return {name: p.detach().float().numpy().copy() for name, p in params.items()}
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(params.values())):
        return {name: p.detach().float().numpy().copy() for name, p in params.items()}


def run_case(case: Case, mesh: Mesh, num_steps: int = 3) -> Run:
    engine = engine_of(case, mesh)
    run = train(engine, mesh, case.accumulation, range(num_steps), Run())
    run.weights = weights_of(engine)
    return run


def run_cases(rank: int, world: int, cases: list[Case]) -> list[Run]:
    """As one rank: each case with fresh groups, all in one process (DeepSpeed takes seconds to import)."""
    partition_everything()
    return [run_case(case, mesh_of_world(case.ep_size, CPU)) for case in cases]


def partition_everything() -> None:
    """Have ZeRO 3 partition the smallest parameter: else the toy's all stay whole, and nothing is tested."""
    import os

    os.environ["DS_ACCELERATOR"] = "cpu"
    import moetrain.engine.deepspeed as ours

    usual = ours._settings

    def settings(*args: Any) -> dict[str, Any]:
        result = usual(*args)
        result["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return result

    ours._settings = settings


def save_to(folder: Path, step: int, engine: Engine, mesh: Mesh) -> None:
    saver = Saver(folder, mesh, SavedBy(mesh.world_size, mesh.ep_size, "", 0, "cpu"), Keep(1), background=False)
    saver.save(step, engine.state(), [], {})
    assert not saver.failure, saver.failure


def load_from(folder: Path, engine: Engine, mesh: Mesh) -> None:
    source = find(folder, mesh)
    assert source is not None
    engine.load_state(source.fill)


def train_and_save(rank: int, world: int, cases: list[Case], folder: str) -> list[Run]:
    """Six steps on end; and, by another engine, three that are saved."""
    partition_everything()
    runs = []
    for case in cases:
        mesh = mesh_of_world(case.ep_size, CPU)
        runs.append(run_case(case, mesh, num_steps=6))
        engine = engine_of(case, mesh)
        train(engine, mesh, case.accumulation, range(3), Run())
        save_to(Path(folder) / case.name, 3, engine, mesh)
    return runs


def load_and_train(rank: int, world: int, cases: list[Case], folder: str) -> list[Run]:
    """In another process: the last three of the six steps, from what was saved."""
    partition_everything()
    runs = []
    for case in cases:
        mesh = mesh_of_world(case.ep_size, CPU)
        engine = engine_of(case, mesh)
        load_from(Path(folder) / case.name, engine, mesh)
        run = train(engine, mesh, case.accumulation, range(3, 6), Run())
        run.weights = weights_of(engine)
        runs.append(run)
    return runs


def repeat_and_break(rank: int, world: int, cases: list[Case]) -> list[dict[str, Any]]:
    """The norm of one micro-batch seen ``accumulation`` times; then a step in which every gradient is nan."""
    results = []
    for case in cases:
        mesh = mesh_of_world(case.ep_size, CPU)
        engine = engine_of(case, mesh)
        batch = batch_of(sequences(0, world)[rank : rank + 1])
        for _ in range(case.accumulation):
            engine.forward_backward(batch)
        norm, before = engine.step(0.1), weights_of(engine)
        kept = {(p.key, p.start): p.values_X.clone() for p in engine.state().held}
        engine.model.fault = float("nan")
        for _ in range(case.accumulation):
            engine.forward_backward(batch)
        broken = engine.step(0.1)
        unchanged = all(np.array_equal(value, before[name]) for name, value in weights_of(engine).items())
        same_state = all(torch.equal(p.values_X, kept[p.key, p.start]) for p in engine.state().held)
        engine.model.fault = 1.0
        for _ in range(case.accumulation):
            engine.forward_backward(batch)
        after = engine.step(0.1)
        results.append({"norm": norm, "broken": broken, "unchanged": unchanged and same_state, "after": after})
    return results
