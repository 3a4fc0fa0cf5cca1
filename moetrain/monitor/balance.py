"""How evenly tokens are spread over experts: pure functions of global counts, in float64.

Notation: c_le is the number of assignments of layer l to expert e BEFORE dropping, over all ranks and micro-batches of
the window; its fair share is mean_e c_le. Counts are added up over ranks first and ratios are taken afterwards: a
mean of rank-local ratios says something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetrain.types import LoadCounts

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LayerBalance:
    """One MoE layer over one window; ``layer`` is its number in the decoder. NaN where no token was routed at all.

    load_max, load_min: max_e and min_e of c_e / mean(c); 1 is fair.
    effective_experts: exp(-sum_e q_e ln q_e) with q = c / sum(c); E when even, n when n experts share all evenly.
    rank_load_max: max over EP ranks of (sum of c_e over the rank's experts) / (mean of that over EP ranks); 1 is fair.
    dead_experts: number of experts with c_e = 0.
    drop_fraction: 1 - sum(kept) / sum(c).
    """

    layer: int
    load_max: float
    load_min: float
    effective_experts: float
    rank_load_max: float
    dead_experts: int
    drop_fraction: float


@dataclass(frozen=True)
class Balance:
    """The headline numbers of one window over all MoE layers, and the layers one by one.

    drop_fraction: 1 - sum_le kept / sum_le c, over all layers together.
    load_max: max over layers of load_max, the load of the worst expert; ``worst_layer`` is where.
    max_vio_mean, max_vio_max: mean and max over layers of MaxVio = (max_e c_e - mean(c)) / mean(c), 0 is fair
    (Wang et al., arXiv 2408.15664).
    effective_experts_mean, effective_experts_min: over layers.
    dead_experts: sum over layers of the experts that received nothing in this window.
    rank_load_max: max over layers; what the slowest EP rank makes the others wait for.
    """

    drop_fraction: float
    load_max: float
    worst_layer: int
    max_vio_mean: float
    max_vio_max: float
    effective_experts_mean: float
    effective_experts_min: float
    dead_experts: int
    rank_load_max: float
    layers: tuple[LayerBalance, ...]


def relative_load(assigned_LE: NDArray[np.int64]) -> Array:
    """c_le / mean_e c_le, [L, E]: 1 is the fair share. NaN in a layer to which nothing was routed."""
    return _ratio(assigned_LE.astype(np.float64), assigned_LE.mean(axis=1, keepdims=True, dtype=np.float64))


def summarise(load: LoadCounts, ep_size: int, layers: Sequence[int]) -> Balance:
    """Counts of all ranks (already summed, int64 [L, E]) -> the numbers of the window.

    Experts [r * E / ep_size, (r + 1) * E / ep_size) live on EP rank r. ``layers``: the decoder layer of each row.
    """
    num_layers, num_experts = load.assigned_LE.shape
    assert num_layers == len(layers) > 0, (num_layers, layers)
    assert num_experts % ep_size == 0, (num_experts, ep_size)
    assigned_LE = load.assigned_LE.cpu().numpy().astype(np.float64)
    kept_LE = load.kept_LE.cpu().numpy().astype(np.float64)
    each = tuple(_layer(n, a_E, k_E, ep_size) for n, a_E, k_E in zip(layers, assigned_LE, kept_LE, strict=True))
    load_max_L = np.array([one.load_max for one in each])
    effective_L = np.array([one.effective_experts for one in each])
    return Balance(
        drop_fraction=1.0 - float(_ratio(kept_LE.sum(), assigned_LE.sum())),
        load_max=float(load_max_L.max()),
        worst_layer=layers[int(load_max_L.argmax())],
        max_vio_mean=float((load_max_L - 1.0).mean()),
        max_vio_max=float((load_max_L - 1.0).max()),
        effective_experts_mean=float(effective_L.mean()),
        effective_experts_min=float(effective_L.min()),
        dead_experts=sum(one.dead_experts for one in each),
        rank_load_max=float(np.max([one.rank_load_max for one in each])),
        layers=each,
    )


def flatten(balance: Balance) -> dict[str, float]:
    """The names under which the numbers are logged: ``balance/...``, and a handful ``moe/layer_07/...`` per layer."""
    out = {f"balance/{name}": float(value) for name, value in vars(balance).items() if name != "layers"}
    for one in balance.layers:
        numbers = {name: float(value) for name, value in vars(one).items() if name != "layer"}
        out.update({f"moe/layer_{one.layer:02d}/{name}": value for name, value in numbers.items()})
    return out


def _layer(layer: int, assigned_E: Array, kept_E: Array, ep_size: int) -> LayerBalance:
    relative_E = _ratio(assigned_E, assigned_E.mean())
    rank_G = assigned_E.reshape(ep_size, -1).sum(axis=1)
    return LayerBalance(
        layer=layer,
        load_max=float(relative_E.max()),
        load_min=float(relative_E.min()),
        effective_experts=_effective(assigned_E),
        rank_load_max=float(_ratio(rank_G, rank_G.mean()).max()),
        dead_experts=int((assigned_E == 0).sum()),
        drop_fraction=1.0 - float(_ratio(kept_E.sum(), assigned_E.sum())),
    )


def _effective(assigned_E: Array) -> float:
    if assigned_E.sum() == 0:
        return float("nan")
    share = assigned_E[assigned_E > 0] / assigned_E.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def _ratio(top: Array, bottom: Array) -> Array:
    """top / bottom, NaN where bottom is 0: "no token" is not "balanced"."""
    return np.divide(top, np.where(np.asarray(bottom) == 0, np.nan, bottom))
