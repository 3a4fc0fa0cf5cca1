"""Run folders made without training: the files that a recorder writes, for runs that went well and for some that did
not. The counts of a window agree with each other, as those of a real run do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from moetrain.monitor.balance import flatten, summarise
from moetrain.monitor.events import EventsFile
from moetrain.monitor.expert_load import ExpertLoadFile, LoadWindow, SplitCounts, is_load_step
from moetrain.monitor.jsonl import MetricsFile
from moetrain.monitor.origin import Origin
from moetrain.monitor.runfolder import RunFolder, open_run_folder
from moetrain.monitor.vitals import vitals
from moetrain.monitor.window import GaugeMeans
from moetrain.types import LoadCounts
from tests.tiny import ROUTER, tiny

Counts = NDArray[np.int64]
Shares = NDArray[np.float64]
TOP_K, PARTS, TOKENS_PER_STEP = 2, 8, 4096


@dataclass(frozen=True)
class Shape:
    """Sizes of a made-up run. done: steps after which it was cut off; None: all."""

    num_layers: int = 4
    num_experts: int = 8
    steps: int = 400
    log_every: int = 10
    world_size: int = 4
    ep_size: int = 2
    done: int | None = None


@dataclass(frozen=True)
class Scenario:
    """share: (progress 0..1, shape) -> wished share of each expert, [L, E], rows need not sum to 1. capacity: slots
    over the fair share, None for dropless. late: how much more likely a late position is to be dropped than the first.
    """

    share: Callable[[float, Shape], Shares]
    capacity: float | None = None
    late: float = 1.0


def _even(progress: float, shape: Shape) -> Shares:
    """Uneven at first, soon within a few per cent."""
    drawn = np.random.default_rng(1).normal(size=(shape.num_layers, shape.num_experts))
    return np.exp(drawn * (0.03 + 0.8 * np.exp(-8 * progress)))


def _collapsing(progress: float, shape: Shape) -> Shares:
    """Layer by layer, all tokens go to experts 0 and 1; the last layer stays even."""
    share_LE = _even(progress, shape)
    layer_L1 = np.arange(shape.num_layers)[:, None] / max(shape.num_layers - 1, 1)
    left_L1 = np.exp(-12 * np.maximum(progress - 0.4 * layer_L1, 0.0) * (layer_L1 < 1))
    share_LE[:, 2:] *= left_L1
    return np.where(share_LE < 1e-4, 0.0, share_LE)


def _hot_rank(_: float, shape: Shape) -> Shares:
    """No expert has more than 1.3 times its share, but those of EP rank 0 all do."""
    share_LE = np.ones((shape.num_layers, shape.num_experts))
    share_LE[:, : shape.num_experts // shape.ep_size] = 1.3
    share_LE[:, shape.num_experts // shape.ep_size :] = 1.0 - 0.3 / max(shape.ep_size - 1, 1)
    return share_LE


SCENARIOS = {
    "healthy": Scenario(_even),
    "collapsing": Scenario(_collapsing, capacity=1.25),
    "late_positions": Scenario(_even, capacity=0.9, late=12.0),
    "hot_rank": Scenario(_hot_rank, capacity=2.0),
}


def write_run(root: Path, scenario: str, shape: Shape = Shape(), name: str | None = None, seed: int = 0) -> Path:
    """A run folder of one of SCENARIOS below ``root``; returns its path. The name is by default the scenario's."""
    folder = _folder(root, name or scenario, shape)
    rng = np.random.default_rng(seed)
    done = shape.steps if shape.done is None else shape.done
    metrics, loads = MetricsFile(folder.metrics, 0, 0), ExpertLoadFile(folder.expert_load, 0, 0)
    events = EventsFile(folder.events, 0)
    for step in range(shape.log_every, done + 1, shape.log_every):
        window = load_window(SCENARIOS[scenario], shape, step, rng)
        counts = LoadCounts(torch.from_numpy(window.assigned_LE), torch.from_numpy(window.kept_LE))
        balance = summarise(counts, shape.ep_size, window.layers)
        metrics.write(step, window.tokens, {**_losses(step, shape, rng), **flatten(balance), **_vitals(window)})
        if step % (5 * shape.log_every) == 0:
            metrics.write(step, window.tokens, {"validation/lm_loss": _loss(step, shape) + 0.1})
        if is_load_step(step, shape.steps, shape.log_every):
            loads.write(window)
        if balance.effective_experts_min < shape.num_experts / 2 and step % (10 * shape.log_every) == 0:
            words = f"layer {balance.worst_layer} uses {balance.effective_experts_min:.1f} experts"
            events.write(step, "alert", words, {"layer": balance.worst_layer})
    for file in (metrics, loads, events):
        file.close()
    return folder.path


def load_window(scenario: Scenario, shape: Shape, step: int, rng: np.random.Generator) -> LoadWindow:
    """The window that ends with ``step``; all its tables add up to the same numbers in each layer."""
    share_LE = scenario.share(step / shape.steps, shape)
    share_LE = share_LE / share_LE.sum(axis=1, keepdims=True)
    total = TOKENS_PER_STEP * shape.log_every * TOP_K
    assigned_LE = np.stack([rng.multinomial(total, share_E) for share_E in share_LE]).astype(np.int64)
    kept_LE = assigned_LE
    if scenario.capacity is not None:
        kept_LE = np.minimum(assigned_LE, int(scenario.capacity * total / shape.num_experts))
    dropped_L = (assigned_LE - kept_LE).sum(axis=1)
    return LoadWindow(
        step=step,
        tokens=step * TOKENS_PER_STEP,
        num_steps=shape.log_every,
        layers=tuple(range(1, shape.num_layers + 1)),
        ep_size=shape.ep_size,
        assigned_LE=assigned_LE,
        kept_LE=kept_LE,
        received_LW=_received(kept_LE, shape),
        choice=_split(total, TOP_K, dropped_L, np.array([1.0, 3.0])),
        position=_split(total, PARTS, dropped_L, np.linspace(1.0, scenario.late, PARTS)),
    )


def _vitals(window: LoadWindow) -> dict[str, float]:
    """Those of the window's counts; routers that are as sure as ever."""
    assert window.choice is not None
    assert window.position is not None
    assert window.received_LW is not None
    same_L = np.ones(len(window.layers))
    gauges = GaugeMeans(
        choice_2LK=np.stack([window.choice.assigned_LX, window.choice.kept_LX]),
        position_2LP=np.stack([window.position.assigned_LX, window.position.kept_LX]),
        received_LW=window.received_LW,
        travelled_LW=window.received_LW // 2,
        entropy_L=0.9 * same_L,
        confidence_L=0.3 * same_L,
        logit_rms_L=same_L,
        logit_max_L=4.0 * same_L,
        swing_L=0.1 * same_L,
    )
    return vitals(gauges, window.layers, row_bytes=512)


def _received(kept_LE: Counts, shape: Shape) -> Counts:
    """The world is rows of ``ep_size`` ranks, and each row gets an equal part of what was kept."""
    per_rank_LG = kept_LE.reshape(len(kept_LE), shape.ep_size, -1).sum(axis=2)
    rows = shape.world_size // shape.ep_size
    parts = [per_rank_LG // rows + (row < per_rank_LG % rows) for row in range(rows)]
    return np.concatenate(parts, axis=1)


def _split(total: int, num_parts: int, dropped_L: Counts, weight_X: Shares) -> SplitCounts:
    """``total`` in equal parts; drops shared out by weight, the rest of a division to the last part."""
    assigned_LX = np.full((len(dropped_L), num_parts), total // num_parts, dtype=np.int64)
    assigned_LX[:, -1] += total % num_parts
    wished_LX = dropped_L[:, None] * weight_X / weight_X.sum()
    given_LX = np.minimum(np.floor(wished_LX).astype(np.int64), assigned_LX)
    for layer, dropped in enumerate(dropped_L):
        for part in reversed(range(num_parts)):
            room = min(dropped - given_LX[layer].sum(), assigned_LX[layer, part] - given_LX[layer, part])
            given_LX[layer, part] += room
    return SplitCounts(assigned_LX, assigned_LX - given_LX)


def _loss(step: int, shape: Shape) -> float:
    return 3.0 + 5.0 * float(np.exp(-4 * step / shape.steps))


def _losses(step: int, shape: Shape, rng: np.random.Generator) -> dict[str, float]:
    noise = float(rng.normal(0.0, 0.02))
    return {
        "train/loss": _loss(step, shape) + noise + 0.01,
        "train/lm_loss": _loss(step, shape) + noise,
        "train/balance_loss": 1.0 + abs(noise),
        "train/z_loss": 0.5 + noise,
        "train/grad_norm": float("nan") if step == 3 * shape.log_every else 1.0 + noise,
        "perf/tokens_per_second": 50_000.0 * (1 + noise),
        "perf/step_seconds": TOKENS_PER_STEP / 50_000.0 / (1 + noise),
        "time/experts_seconds": 0.04,
        "time/exchange_seconds": 0.01 + 0.01 * abs(noise),
    }


def _folder(root: Path, name: str, shape: Shape) -> RunFolder:
    router = {**ROUTER, "top_k": TOP_K}
    config = tiny(
        router=router,
        run__root=str(root),
        run__id=name,
        run__resume="auto",
        model__num_layers=shape.num_layers,
        experts__num_experts=shape.num_experts,
        engine__ep_size=shape.ep_size,
        train__steps=shape.steps,
        monitor__log_every=shape.log_every,
        recipe__name="made-up",
    )
    facts = Origin("host", shape.world_size, ["moetrain", "train"], None, {"torch": "2"}, "0123456789abcdef", False, "")
    return open_run_folder(config, "made: up\n", 0, lambda text: text, facts)
