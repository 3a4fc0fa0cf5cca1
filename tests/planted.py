"""Small models trained for seconds on the text that ships, with a fault planted or with none, as rows of metrics.jsonl.

The faults are planted in the run, not in its numbers: what the doctor is shown is what a recorder would have written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moetrain.config import Config
from moetrain.data.kjv import kjv_documents
from moetrain.engine import make_engine
from moetrain.models.decoder import Decoder
from moetrain.monitor.gradient_ratio import gradient_ratios
from moetrain.monitor.jsonl import STEP, TOKENS
from moetrain.monitor.rows import Rows, Timing
from moetrain.monitor.window import Window
from moetrain.optim import lr_at
from moetrain.parallel.mesh import Mesh
from moetrain.types import Batch
from tests.tiny import ROUTER, alone, tiny

VOCAB = 128
Touch = Callable[[Decoder], None]


@dataclass(frozen=True)
class Case:
    """changes: of the config below. at_start, each_step: what is done to the model. ep_size: of the rank loads, which
    are those of any layout, since counts are global. measured: with the gradient ratio of each window.
    """

    name: str
    expected: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    router: Mapping[str, Any] = field(default_factory=lambda: dict(ROUTER))
    at_start: Touch | None = None
    each_step: Touch | None = None
    ep_size: int = 1
    measured: bool = False


def config_of(case: Case, seed: int = 0, steps: int = 192, log_every: int = 8) -> Config:
    """Three MoE layers of eight experts, dropless, balanced as usual; then the changes of the case."""
    usual: dict[str, Any] = {
        "run__seed": seed,
        "model__dim": 32,
        "model__num_layers": 3,
        "model__context": 32,
        "model__init_std": 0.02,
        "balance__balance_coef": 0.01,
        "balance__z_coef": 0.001,
        "balance__scope": "micro_batch",
        "optim__name": "adamw",
        "optim__lr": 3e-3,
        "optim__warmup_steps": 20,
        "optim__clip_norm": 1.0,
        "train__steps": steps,
        "train__global_batch": 16,
        "train__micro_batch": 16,
        "monitor__log_every": log_every,
        "dispatch": "local",
    }
    return tiny(router=dict(case.router), **{**usual, **case.changes})


def train(case: Case, config: Config) -> Iterator[dict[str, float]]:
    """Train it; each window as metrics.jsonl would have it, as soon as it is over."""
    mesh, seed = alone(), config.run.seed
    torch.manual_seed(seed)
    model = Decoder(config, mesh, VOCAB)
    if case.at_start is not None:
        case.at_start(model)
    engine, window = make_engine(config, model, mesh, 1), Window(mesh)
    rows = Rows(config, Mesh(0, 1, case.ep_size, mesh.device), VOCAB)
    for step in range(config.train.steps):
        batch = batch_of(config, seed, step)
        window.add(engine.forward_backward(batch))
        model.commit_load()
        engine.step(lr_at(step, config.train.steps, config.optim))
        model.adapt_routers(moved=True)
        window.add_load(model.take_load(), model.take_gauges())
        if case.each_step is not None:
            case.each_step(model)
        done = step + 1
        if done % config.monitor.log_every == 0:
            ratios = gradient_ratios(model, batch) if case.measured else {}
            timing = Timing(config.monitor.log_every, 1.0, {})
            row = rows.of(window.reduce(), ratios, model.router_numbers(), timing)
            yield {STEP: float(done), TOKENS: float(done * rows.tokens_per_step), **row.numbers}


def batch_of(config: Config, seed: int, step: int) -> Batch:
    """Windows at random places of the text."""
    text, context = text_bytes(), config.model.context
    starts = np.random.default_rng([seed, step]).integers(0, len(text) - context - 1, config.train.micro_batch)
    windows = torch.from_numpy(np.stack([text[start : start + context + 1] for start in starts]).astype(np.int64))
    return Batch(windows[:, :-1], windows[:, 1:])


@lru_cache(maxsize=1)
def text_bytes() -> np.ndarray:
    text = "\n\n".join(kjv_documents()).encode()
    return np.minimum(np.frombuffer(text, dtype=np.uint8), VOCAB - 1)


def weights(layer: int | None, change: Callable[[Any], Tensor], name: str = "gate") -> Touch:
    """Set a parameter or buffer of the router of one MoE layer, or of all."""

    def touch(model: Decoder) -> None:
        for number, one in enumerate(model.moe_layers()):
            if layer in (None, number):
                with torch.no_grad():
                    getattr(one.router, name).copy_(change(getattr(one.router, name)))

    return touch
