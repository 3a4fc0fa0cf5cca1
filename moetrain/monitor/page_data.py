"""What the page of a report knows of a run: plain values for JSON, and counts packed into base64.

Counts are 16-bit: a window in which an expert got more than 65535 assignments is divided by ``scale``, so that the page
shows at least three digits; one assignment is never rounded to none.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moetrain.monitor.balance import LayerBalance, summarise
from moetrain.monitor.charts import charts_of
from moetrain.monitor.domains import DomainCounts, divergences
from moetrain.monitor.events import Event
from moetrain.monitor.expert_load import LoadWindow, SplitCounts
from moetrain.monitor.history import History
from moetrain.types import LoadCounts

BYTES = 1_500_000
MAX_EVENTS = 300
MAX_COUNT = 65535
BASE64, NUMBER = 4 / 3, 6


def page_run(history: History, num_bytes: int) -> dict[str, Any]:
    """Everything about one run, in about ``num_bytes`` bytes at most, and half as much for domains: with long runs of
    large models, fewer windows.
    """
    facts = history.facts
    windows = _affordable(history.loads, num_bytes)
    return {
        "id": facts.id,
        "facts": [list(pair) for pair in _fact_rows(history).items()],
        "state": _state(history),
        "note": _note(len(history.loads), len(windows)),
        "loads": [_window(window) for window in windows],
        "domains": _domains(history.loads, num_bytes // 2),
        "charts": charts_of(history.series),
        "events": [_event(event) for event in history.events[-MAX_EVENTS:]],
        "events_left_out": max(len(history.events) - MAX_EVENTS, 0),
    }


def _affordable(loads: Sequence[LoadWindow], num_bytes: int) -> list[LoadWindow]:
    """Every n-th window counted from the last."""
    if not loads:
        return []
    num_layers, num_experts = loads[-1].assigned_LE.shape
    received_LW = loads[-1].received_LW
    num_ranks = loads[-1].ep_size if received_LW is None else received_LW.shape[1]
    tables = 2 if any((window.kept_LE != window.assigned_LE).any() for window in loads) else 1
    each = num_layers * num_experts * 2 * tables * BASE64 + NUMBER * (8 * num_layers + num_ranks)
    every = math.ceil(len(loads) / max(num_bytes / each, 1))
    return list(loads[::-1][::every][::-1])


def _domains(loads: Sequence[LoadWindow], num_bytes: int) -> dict[str, Any]:
    """Names, and every n-th window that has counts by domain, counted from the last."""
    counted = [(window, window.domains) for window in loads if window.domains is not None]
    if not counted:
        return {"names": [], "windows": []}
    last = counted[-1][1]
    every = math.ceil(len(counted) / max(num_bytes / (last.assigned_LDE.size * 2 * BASE64), 1))
    shown = [(window, domains) for window, domains in counted[::-1][::every][::-1] if domains.names == last.names]
    return {"names": list(last.names), "windows": [_domain_window(*one) for one in shown]}


def _domain_window(window: LoadWindow, domains: DomainCounts) -> dict[str, Any]:
    scale = max(1, math.ceil(int(domains.assigned_LDE.max()) / MAX_COUNT))
    return {
        "step": window.step,
        "layers": list(window.layers),
        "scale": scale,
        "assigned": _packed(domains.assigned_LDE, scale),
        "divergences": [_short(value) for value in divergences(domains.assigned_LDE)],
    }


def _window(window: LoadWindow) -> dict[str, Any]:
    scale = max(1, math.ceil(int(window.assigned_LE.max()) / MAX_COUNT))
    dropped = bool((window.kept_LE != window.assigned_LE).any())
    rank_LW = _rank_load(window)
    counts = LoadCounts(torch.from_numpy(window.assigned_LE), torch.from_numpy(window.kept_LE))
    each = summarise(counts, window.ep_size, window.layers).layers
    return {
        "step": window.step,
        "tokens": window.tokens,
        "num_steps": window.num_steps,
        "layers": list(window.layers),
        "experts": window.assigned_LE.shape[1],
        "scale": scale,
        "assigned": _packed(window.assigned_LE, scale),
        "kept": _packed(window.kept_LE, scale) if dropped else None,
        "table": [_row(*layer) for layer in zip(each, window.assigned_LE, rank_LW, strict=True)],
        "ranks": [_short(load) for load in _relative(rank_LW.sum(axis=0, keepdims=True))[0]],
        "received": window.received_LW is not None,
        "choice": _dropped(window.choice),
        "position": _dropped(window.position),
    }


def _row(one: LayerBalance, assigned_E: NDArray[np.int64], rank_W: NDArray[np.int64]) -> list[float | None]:
    """load_max, load_min, effective and dead experts, dropped %, busiest rank, its load over the mean, busiest
    expert.
    """
    relative_W = _relative(rank_W[None])[0]
    numbers = (one.load_max, one.load_min, one.effective_experts, one.dead_experts, 100 * one.drop_fraction)
    rank, expert = int(rank_W.argmax()), int(assigned_E.argmax())
    return [*(_short(number) for number in numbers), rank, _short(relative_W.max()), expert]


def _rank_load(window: LoadWindow) -> NDArray[np.int64]:
    """Rows that each rank received, [L, W]; where that is not known, what each EP rank was assigned before dropping."""
    if window.received_LW is not None:
        return window.received_LW
    return window.assigned_LE.reshape(len(window.layers), window.ep_size, -1).sum(axis=2)


def _relative(counts_LW: NDArray[np.int64]) -> NDArray[np.float64]:
    """Over the mean of the row; NaN where the row is empty."""
    mean_L1 = counts_LW.mean(axis=1, keepdims=True)
    return counts_LW / np.where(mean_L1 == 0, np.nan, mean_L1)


def _dropped(split: SplitCounts | None) -> list[float | None] | None:
    """Per cent over all layers, a number a choice or part of the sequence; None in it where nothing was assigned."""
    if split is None:
        return None
    assigned_X, kept_X = split.assigned_LX.sum(axis=0), split.kept_LX.sum(axis=0)
    return [_short(100 * (1 - k / a)) if a else None for a, k in zip(assigned_X, kept_X, strict=True)]


def _packed(counts_LX: NDArray[np.int64], scale: int) -> str:
    """Rounded counts, of any shape, / scale as little-endian 16-bit numbers, row by row."""
    scaled_LX = np.maximum(np.rint(counts_LX / scale), counts_LX > 0)
    return base64.b64encode(scaled_LX.astype("<u2").tobytes()).decode()


def _short(value: float) -> float | None:
    """Four digits are enough to read; JSON has no NaN."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _event(event: Event) -> dict[str, Any]:
    return {"step": event.step, "kind": event.kind, "message": event.message, "undone": event.undone}


def _fact_rows(history: History) -> Mapping[str, str]:
    facts = history.facts
    started = datetime.fromisoformat(facts.started).isoformat(" ", "seconds")
    rows = {
        "recipe": facts.recipe,
        "router": facts.router,
        "experts": f"{facts.num_experts}, {facts.top_k} a token" if facts.top_k else str(facts.num_experts),
        "ranks": f"{facts.world_size}, of which {facts.ep_size} share the experts"
        if facts.ep_size
        else str(facts.world_size),
        "started": started if facts.starts == 1 else f"{started}, {facts.starts} times in all",
        "source": facts.commit[:12] if facts.commit else "an installed package",
        "folder": str(facts.folder.resolve()),
    }
    return {"state": _state(history), **rows}


def _state(history: History) -> str:
    done, steps = history.last_step, history.facts.steps
    return f"all {steps} steps done" if history.is_over else f"step {done} of {steps} when this page was written"


def _note(num_all: int, num_shown: int) -> str:
    if not num_all:
        return "This run has recorded no expert load."
    return "" if num_all == num_shown else f"{num_shown} of {num_all} recorded windows are in this page."
