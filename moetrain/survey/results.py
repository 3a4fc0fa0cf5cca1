"""What a finished run says, and what the seeds of a router say together."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields

from moetrain.monitor.jsonl import STEP, read_metrics
from moetrain.monitor.runfolder import RunFolder


@dataclass(frozen=True)
class Numbers:
    """One run. Losses are cross-entropies in nats per token.

    validation_loss: after the last step. train_loss: mean of the last window. The next five are means over the windows
    of the second half of training: max_vio, max_e c_e / mean(c) - 1 with c the assignments before dropping, mean over
    layers; worst_vio, the same of the worst layer; drop_fraction, 0..1; dead_experts, without a token in a window, sum
    over layers; experts_per_token, assigned, mean over layers. tokens_per_second: median over all windows but the
    first, which holds the warming up.
    """

    validation_loss: float
    train_loss: float
    max_vio: float
    worst_vio: float
    drop_fraction: float
    dead_experts: float
    experts_per_token: float
    tokens_per_second: float


@dataclass(frozen=True)
class Spread:
    """Of one number over the seeds. std: of the sample, None for one seed."""

    mean: float
    low: float
    high: float
    std: float | None


def rows_of(folder: RunFolder) -> list[dict[str, float]]:
    """The metrics of a run, [] if it has none. Raises ValueError if they are damaged."""
    return read_metrics(folder.metrics)


def numbers_of(folder: RunFolder) -> Numbers:
    """Of a run that is done."""
    rows = rows_of(folder)
    windows = [row for row in rows if "balance/load_max" in row]
    late = [row for row in windows if 2 * row[STEP] > rows[-1][STEP]]

    def over(name: str) -> float:
        return statistics.fmean(row[name] for row in late)

    return Numbers(
        validation_loss=rows[-1]["validation/lm_loss"],
        train_loss=windows[-1]["train/lm_loss"],
        max_vio=over("balance/max_vio_mean"),
        worst_vio=over("balance/max_vio_max"),
        drop_fraction=over("balance/drop_fraction"),
        dead_experts=over("balance/dead_experts"),
        experts_per_token=over("balance/experts_per_token"),
        tokens_per_second=statistics.median(row["perf/tokens_per_second"] for row in windows[1:] or windows),
    )


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), min(values), max(values), std)


def spreads(runs: Sequence[Numbers]) -> dict[str, Spread]:
    """By the names of ``Numbers``."""
    return {field.name: spread([getattr(numbers, field.name) for numbers in runs]) for field in fields(Numbers)}
