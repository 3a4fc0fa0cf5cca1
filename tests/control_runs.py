"""Short trainings of the tiny model under controllers, and experts restarted under every engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from moetrain.config import Config
from moetrain.control import Control
from moetrain.control.base import Action, Seen
from moetrain.control.restart import Restart, restart
from moetrain.engine import Engine, make_engine
from moetrain.models.decoder import Decoder
from moetrain.monitor.balance import Balance, summarise
from moetrain.monitor.window import Window
from moetrain.ops.init import Draw
from moetrain.parallel.mesh import Mesh, mesh_of_world
from moetrain.types import LoadCounts
from tests.engine_runs import partition_everything
from tests.tiny import ROUTER, VOCAB, alone, part_of, tiny, tokens

RESTARTS = [Restart(0, 5, 1), Restart(1, 2, 7), Restart(1, 3, 7)]
FULL = {**ROUTER, "logit_bias": True, "bias": "sign", "noise": "learned"}


@dataclass
class Story:
    """What happened: a balance a window, and all actions with their step."""

    balances: list[Balance] = field(default_factory=list)
    actions: list[tuple[int, Action]] = field(default_factory=list)
    numbers: list[dict[str, float]] = field(default_factory=list)


def train(config: Config, mesh: Mesh | None = None, window_steps: int = 5) -> tuple[Story, Engine]:
    """All steps of ``config`` on random tokens, with its controllers asked after each window."""
    mesh, story = mesh or alone(), Story()
    torch.manual_seed(0)
    model = Decoder(config, mesh, VOCAB)
    engine = make_engine(config, model, mesh, 1)
    control, window = Control(config, model, engine, mesh), Window(mesh)
    each = config.train.global_batch // mesh.world_size
    for done in range(1, config.train.steps + 1):
        batch = tokens(config.train.global_batch, config.model.context, seed=done)
        window.add(engine.forward_backward(part_of(batch, mesh.rank * each, (mesh.rank + 1) * each)))
        model.commit_load()
        engine.step(config.optim.lr)
        model.adapt_routers(moved=True)
        window.add_load(model.take_load(), model.take_gauges())
        if done % window_steps == 0:
            means = window.reduce()
            assert means.load is not None
            story.balances.append(summarise(means.load, mesh.ep_size, range(config.model.num_layers)))
            story.actions += [(done, action) for action in control.act(done, means)]
            story.numbers.append(control.numbers())
    return story, engine


def seen(assigned: list[list[int]], kept: list[list[int]] | None = None, step: int = 10, share: float = 0.5) -> Seen:
    """A window of ten steps with these global counts, a row a layer."""
    load = LoadCounts(torch.tensor(assigned), torch.tensor(assigned if kept is None else kept))
    return Seen(
        step, share, 10, summarise(load, 1, range(len(assigned))), load.assigned_LE.numpy(), load.kept_LE.numpy()
    )


@dataclass(frozen=True)
class Layout:
    """How the same model is spread."""

    engine: str
    zero: int
    ep: int
    dtype: str = "fp32"

    def config(self) -> Config:
        return tiny(
            router=FULL,
            engine__name=self.engine,
            engine__zero_stage=self.zero,
            engine__ep_size=self.ep,
            engine__dtype=self.dtype,
            optim__name="adamw",
            experts__bias=True,
        )


@dataclass(frozen=True)
class Restarted:
    """This rank's shares before and after, key -> [(start, values)]; the validation loss of the same tokens before and
    after, and the gradient norm of a step from there.
    """

    before: dict[str, list[tuple[int, np.ndarray]]]
    after: dict[str, list[tuple[int, np.ndarray]]]
    losses: tuple[float, float]
    norm: float


def restarted(layout: Layout, mesh: Mesh) -> Restarted:
    """A step without a learning rate, so that there are moments but the weights are the same everywhere; a restart."""
    config = layout.config()
    model = Decoder(config, mesh, VOCAB)
    for index, layer in enumerate(model.moe_layers()):
        layer.router.get_buffer("bias_E").copy_(torch.arange(8.0) + index)
    engine = make_engine(config, model, mesh, 1)
    batch = part_of(tokens(8, config.model.context), 4 * mesh.rank, 4 * (mesh.rank + 1))
    engine.forward_backward(batch)
    engine.step(0.0)
    before, loss = shares(engine), float(engine.evaluate(tokens(8, config.model.context)).lm)
    restart(engine, model, mesh, RESTARTS, Draw(3).of("revive.1"), 0.1)
    after, losses = shares(engine), (loss, float(engine.evaluate(tokens(8, config.model.context)).lm))
    engine.forward_backward(batch)
    return Restarted(before, after, losses, engine.step(0.1))


def shares(engine: Engine) -> dict[str, list[tuple[int, np.ndarray]]]:
    found: dict[str, list[tuple[int, np.ndarray]]] = {}
    for piece in engine.state().shares:
        found.setdefault(piece.key, []).append((piece.start, piece.values_X.detach().float().numpy().copy()))
    return found


def restarted_layouts(rank: int, world: int, layouts: list[Layout]) -> list[Restarted]:
    partition_everything()
    return [restarted(layout, mesh_of_world(layout.ep, torch.device("cpu"))) for layout in layouts]


def merged(parts: list[dict[str, list[tuple[int, np.ndarray]]]]) -> dict[str, np.ndarray]:
    """The whole tensors that all ranks' shares make up."""
    pieces: dict[str, list[tuple[int, np.ndarray]]] = {}
    for part in parts:
        for key, some in part.items():
            pieces.setdefault(key, []).extend(some)
    return {key: np.concatenate([v for _, v in sorted(some, key=lambda p: p[0])]) for key, some in pieces.items()}


def revived_at(rank: int, world: int, ep_size: int, changes: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """A collapsed run with revival as one rank; the actions, and this rank's shares at the end."""
    story, engine = train(tiny(**changes), mesh_of_world(ep_size, torch.device("cpu")))
    return [action.message for _, action in story.actions], shares(engine)
