"""How differently the domains of a corpus are routed: pure functions of global counts, in float64.

c_de is the number of assignments of tokens of domain d to expert e before dropping, over all ranks and micro-batches
of a window. Written with p(d, e) = c_de / sum(c), the number is I(d; e) / H(d): what an assignment's expert tells of
its domain, as a share of all there is to tell. I(d; e) is the Jensen-Shannon divergence of the domains' distributions
over experts, each weighted by its share of the assignments (Lin, "Divergence measures based on the Shannon entropy",
1991). 0: all domains are routed alike; 1: no two domains have an expert in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetrain.monitor.pace import is_spread_step

Counts = NDArray[np.int64]
Array = NDArray[np.float64]
NUM_RECORDS = 500
MOST_COUNTS = 25_000_000  # of all records of a run together: about 100 MB of JSON


@dataclass(frozen=True)
class DomainCounts:
    """names: of the domains. assigned_LDE: assignments of their tokens before dropping, layer by layer."""

    names: tuple[str, ...]
    assigned_LDE: Counts


def divergences(assigned_LDE: Counts) -> Array:
    """[L], 0..1; NaN in a layer that fewer than two domains' tokens came to."""
    return np.array([_divergence(counts_DE) for counts_DE in assigned_LDE.astype(np.float64)])


def domain_numbers(assigned_LDE: Counts, layers: Sequence[int]) -> dict[str, float]:
    """moe/layer_07/domain_divergence, and the mean over the layers that have one; ``layers``: of each row."""
    each_L = divergences(assigned_LDE)
    known_L = each_L[np.isfinite(each_L)]
    numbers = {f"moe/layer_{n:02d}/domain_divergence": float(v) for n, v in zip(layers, each_L, strict=True)}
    return numbers | {"balance/domain_divergence_mean": float(known_L.mean()) if len(known_L) else float("nan")}


def is_domain_step(step: int, steps: int, log_every: int, num_counts: int) -> bool:
    """Whether the window that ends with this step is recorded by domain too: the last one, and of those whose load is
    recorded as many as MOST_COUNTS allows, but for 10. num_counts: L * D * E.
    """
    most = min(max(MOST_COUNTS // num_counts, 10), NUM_RECORDS)
    return step == steps or is_spread_step(step, steps, log_every, most)


def _divergence(counts_DE: Array) -> float:
    counts_DE = counts_DE[counts_DE.sum(axis=1) > 0]
    if len(counts_DE) < 2:
        return float("nan")
    shares_DE = counts_DE / counts_DE.sum()
    domain_D, expert_E = shares_DE.sum(axis=1), shares_DE.sum(axis=0)
    told = _entropy(domain_D) + _entropy(expert_E) - _entropy(shares_DE)
    return min(max(told / _entropy(domain_D), 0.0), 1.0)


def _entropy(shares_X: Array) -> float:
    positive_X = shares_X[shares_X > 0]
    return float(-(positive_X * np.log(positive_X)).sum())
