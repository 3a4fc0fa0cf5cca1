"""Which curves a report draws, and curves made small enough to be drawn without losing their peaks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moetrain.monitor.history import Series

MAX_POINTS = 800
DIGITS = 5


@dataclass(frozen=True)
class Curve:
    """A metric and what it is called beside its curve."""

    name: str
    label: str


@dataclass(frozen=True)
class Chart:
    """Curves that share one axis. factor: what values are multiplied by. floor: where the axis begins; None: free."""

    title: str
    curves: tuple[Curve, ...]
    floor: float | None = None
    factor: float = 1.0


CHARTS = (
    Chart("Loss, nats/token", (Curve("train/lm_loss", "train"), Curve("validation/lm_loss", "validation"))),
    Chart(
        "Busiest expert and rank, times the fair share",
        (
            Curve("balance/load_max", "expert"),
            Curve("balance/rank_load_max", "expert-parallel rank, assigned"),
            Curve("balance/received_max", "rank, rows received"),
        ),
        floor=1.0,
    ),
    Chart(
        "MaxVio, 0 is even",
        (Curve("balance/max_vio_mean", "mean over layers"), Curve("balance/max_vio_max", "worst layer")),
        floor=0.0,
    ),
    Chart(
        "Effective experts",
        (
            Curve("balance/effective_experts_mean", "mean over layers"),
            Curve("balance/effective_experts_min", "worst layer"),
        ),
        floor=0.0,
    ),
    Chart("Dropped, %", (Curve("balance/drop_fraction", "dropped"),), floor=0.0, factor=100.0),
    Chart("Dead experts, over all layers", (Curve("balance/dead_experts", "dead"),), floor=0.0),
    Chart(
        "Balance loss (1 is even), and the router's own",
        (Curve("train/balance_loss", "balance"), Curve("train/own_loss", "the router's own")),
    ),
    Chart("z-loss", (Curve("train/z_loss", "mean over layers"),), floor=0.0),
    Chart(
        "Router entropy (1 is uniform) and confidence",
        (
            Curve("balance/router_entropy", "entropy, mean over layers"),
            Curve("balance/router_confidence", "largest probability, mean over tokens"),
        ),
        floor=0.0,
    ),
    Chart(
        "Domain divergence, 0: all domains are routed alike",
        (Curve("balance/domain_divergence_mean", "mean over layers"),),
        floor=0.0,
    ),
    Chart(
        "Swing of the load from step to step, fair shares",
        (Curve("balance/swing", "worst layer"),),
        floor=0.0,
    ),
    Chart("Coefficient of the balance loss, as steered", (Curve("control/balance_coef", "in force"),), floor=0.0),
    Chart("Capacity factor, as steered", (Curve("control/capacity_factor", "in force"),), floor=0.0),
    Chart("Experts restarted so far", (Curve("control/restarts", "all layers"),), floor=0.0),
    Chart("Experts lent to all ranks", (Curve("control/shadowed", "all layers"),), floor=0.0),
    Chart("Largest router logit, worst layer", (Curve("balance/logit_max", "logit"),)),
    Chart("Gradient norm", (Curve("train/grad_norm", "before clipping"),), floor=0.0),
    Chart("Throughput, tokens/s", (Curve("perf/tokens_per_second", "all ranks"),), floor=0.0),
    Chart(
        "Time of a step, ms",
        (
            Curve("perf/step_seconds", "the whole step"),
            Curve("time/experts_seconds", "experts"),
            Curve("time/exchange_seconds", "exchange"),
        ),
        floor=0.0,
        factor=1000.0,
    ),
)


def charts_of(series: Mapping[str, Series]) -> list[dict[str, object]]:
    """All charts as plain values, each with those curves that the run has: points as [step, value or null]."""
    return [
        {
            "title": chart.title,
            "floor": chart.floor,
            "curves": [
                {"label": curve.label, "colour": at, "points": points(series[curve.name], chart.factor)}
                for at, curve in enumerate(chart.curves)
                if curve.name in series
            ],
        }
        for chart in CHARTS
    ]


def points(series: Series, factor: float) -> list[list[float | None]]:
    """At most MAX_POINTS [step, value], None where the value is not finite; of each stretch the least and the most."""
    values_N = series.values_N * factor
    kept = _thinned(values_N)
    return [
        [int(series.steps_N[i]), float(f"{values_N[i]:.{DIGITS}g}") if np.isfinite(values_N[i]) else None] for i in kept
    ]


def _thinned(values_N: np.ndarray) -> list[int]:
    """Indices in order: all of them, or the first, the last, and of each stretch its least and greatest value."""
    if len(values_N) <= MAX_POINTS:
        return list(range(len(values_N)))
    chosen = {0, len(values_N) - 1}
    for stretch in np.array_split(np.arange(len(values_N)), (MAX_POINTS - 2) // 2):
        values = np.where(np.isfinite(values_N[stretch]), values_N[stretch], np.inf)
        chosen |= {int(stretch[values.argmin()]), int(stretch[values.argmax()])}
    return sorted(chosen)
