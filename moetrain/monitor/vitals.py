"""The numbers of a window besides the load: drops by choice and position, rows per rank, how sure routers are.

Pure functions of what ``Window.reduce`` gives, in float64; the number of keys is bounded whatever E, k and L are, but
for a handful a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from moetrain.monitor.window import GaugeMeans

Array = NDArray[np.float64]
MAX_CHOICES = 8


def vitals(gauges: GaugeMeans, layers: Sequence[int], row_bytes: int) -> dict[str, float]:
    """Logged names and values. ``row_bytes``: bytes of one token's row in the exchange.

    balance/drop_choice_<i>, balance/drop_position_<i>: dropped share of the i-th choice (the first eight) and of the
    i-th eighth of the sequence, over all layers. balance/late_drop: of the last eighth minus that of the first.
    balance/received_max: rows of the busiest rank over the mean of the ranks, in the worst layer; 1 is fair.
    balance/exchange_mib_max: MiB of rows that one rank, the busiest, got from others in the window, all layers, one
    way of the two. Under padded dispatch a row is a slot, filled or empty, and all ranks get as many.
    balance/router_entropy, router_confidence: means over layers; logit_max, swing: of the worst layer.
    """
    choice_K, position_P = (dropped(counts.sum(axis=1)) for counts in (gauges.choice_2LK, gauges.position_2LP))
    received_LW = gauges.received_LW.astype(np.float64)
    numbers = {f"balance/drop_choice_{i}": share for i, share in enumerate(choice_K[:MAX_CHOICES])}
    numbers |= {f"balance/drop_position_{i}": share for i, share in enumerate(position_P)}
    numbers |= {
        "balance/late_drop": position_P[-1] - position_P[0],
        "balance/received_max": float(np.max(_relative(received_LW))),
        "balance/exchange_mib_max": float(gauges.travelled_LW.sum(axis=0).max()) * row_bytes / 2**20,
        "balance/router_entropy": float(gauges.entropy_L.mean()),
        "balance/router_confidence": float(gauges.confidence_L.mean()),
        "balance/logit_max": float(gauges.logit_max_L.max()),
        "balance/swing": float(gauges.swing_L.max()),
    }
    return {name: float(value) for name, value in numbers.items()} | _by_layer(gauges, layers, received_LW)


def router_state(states: Sequence[Mapping[str, float]], layers: Sequence[int]) -> dict[str, float]:
    """What routers keep outside of the gradient: each layer's, and the largest over layers, by the routers' names."""
    numbers = {
        f"moe/layer_{n:02d}/{name}": v for n, state in zip(layers, states, strict=True) for name, v in state.items()
    }
    names = {name for state in states for name in state}
    return numbers | {f"balance/{name}_max": max(state.get(name, 0.0) for state in states) for name in sorted(names)}


def dropped(counts_2X: NDArray[np.int64]) -> Array:
    """Assigned and kept, [2, X] -> dropped share [X]; NaN where nothing was assigned."""
    assigned_X, kept_X = counts_2X.astype(np.float64)
    return 1.0 - kept_X / np.where(assigned_X == 0, np.nan, assigned_X)


def _by_layer(gauges: GaugeMeans, layers: Sequence[int], received_LW: Array) -> dict[str, float]:
    columns = {
        "router_entropy": gauges.entropy_L,
        "router_confidence": gauges.confidence_L,
        "logit_rms": gauges.logit_rms_L,
        "logit_max": gauges.logit_max_L,
        "swing": gauges.swing_L,
        "received_max": _relative(received_LW),
    }
    return {f"moe/layer_{n:02d}/{name}": float(v[i]) for i, n in enumerate(layers) for name, v in columns.items()}


def _relative(received_LW: Array) -> Array:
    """Rows of the busiest rank over the mean, [L]; NaN where nothing was sent."""
    mean_L = received_LW.mean(axis=1)
    return received_LW.max(axis=1) / np.where(mean_L == 0, np.nan, mean_L)
