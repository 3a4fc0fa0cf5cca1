"""What a finished run says, and what the seeds of a router say together. What has no number is NaN."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields

from moetrain.monitor.jsonl import STEP, read_metrics
from moetrain.monitor.runfolder import RunFolder


@dataclass(frozen=True)
class Numbers:
    """One run. NaN: could not be measured, or trained to NaN. Losses are cross-entropies in nats per token.

    validation_loss: after the last step. train_loss: mean of the last window. The next five are means over the windows
    of the second half of training: max_vio, max_e c_e / mean(c) - 1 with c the assignments before dropping, mean over
    layers; worst_vio, the same of the worst layer; drop_fraction, 0..1; dead_experts, without a token in a window, sum
    over layers; experts_per_token, assigned, mean over layers. tokens_per_second: median over all windows but the
    first, which holds the warming up. num_windows: of the second half; no_load: those of them in which a layer had no
    assignment at all, and so no max_vio, which are left out of its mean.
    """

    validation_loss: float
    train_loss: float
    max_vio: float
    worst_vio: float
    drop_fraction: float
    dead_experts: float
    experts_per_token: float
    tokens_per_second: float
    num_windows: int
    no_load: int


@dataclass(frozen=True)
class Spread:
    """Of one number over the seeds that have a finite one, NaN if none has. std: of the sample, None for one seed.
    num_missing: seeds without a finite number.
    """

    mean: float
    low: float
    high: float
    std: float | None
    num_missing: int = 0


def rows_of(folder: RunFolder) -> list[dict[str, float]]:
    """The metrics of a run, [] if it has none. Raises ValueError if they are damaged."""
    return read_metrics(folder.metrics)


def numbers_of(folder: RunFolder) -> Numbers:
    """Of a run that is done."""
    rows = rows_of(folder)
    windows = [row for row in rows if "balance/load_max" in row]
    late = [row for row in windows if 2 * row[STEP] > rows[-1][STEP]]

    def over(name: str) -> float:
        return _mean([row.get(name, math.nan) for row in late])

    speeds = [row.get("perf/tokens_per_second", math.nan) for row in windows[1:] or windows]
    return Numbers(
        validation_loss=rows[-1]["validation/lm_loss"],
        train_loss=windows[-1].get("train/lm_loss", math.nan) if windows else math.nan,
        max_vio=over("balance/max_vio_mean"),
        worst_vio=over("balance/max_vio_max"),
        drop_fraction=over("balance/drop_fraction"),
        dead_experts=over("balance/dead_experts"),
        experts_per_token=over("balance/experts_per_token"),
        tokens_per_second=statistics.median(speeds) if speeds else math.nan,
        num_windows=len(late),
        no_load=sum(not math.isfinite(row.get("balance/max_vio_mean", math.nan)) for row in late),
    )


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    finite = [value for value in values if math.isfinite(value)]
    num_missing = len(values) - len(finite)
    if not finite:
        return Spread(math.nan, math.nan, math.nan, None, num_missing)
    std = statistics.stdev(finite) if len(finite) > 1 else None
    return Spread(statistics.fmean(finite), min(finite), max(finite), std, num_missing)


def spreads(runs: Sequence[Numbers]) -> dict[str, Spread]:
    """By the names of ``Numbers`` that are measured."""
    names = [field.name for field in fields(Numbers) if field.type == "float"]
    return {name: spread([getattr(numbers, name) for numbers in runs]) for name in names}


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan
