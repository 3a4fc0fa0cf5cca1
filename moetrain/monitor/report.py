"""What a run says when it ends: once in the terminal, and as plain text in the run folder."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from moetrain.monitor.balance import Balance
from moetrain.monitor.progress import clock, thousands
from moetrain.monitor.tables import load_table
from moetrain.types import LoadCounts

PLAIN_WIDTH = 100
MAX_RANKS = 8
MIB = 2**20


@dataclass(frozen=True)
class LossReport:
    """Cross-entropies in nats per token, and the corpus' own: what counting tokens, and pairs of tokens, would reach.

    train: mean of the last window. validation: None if the run has not evaluated. bytes_per_token: of the corpus' text.
    """

    train: float
    validation: float | None
    unigram_entropy: float
    bigram_entropy: float
    bytes_per_token: float


@dataclass(frozen=True)
class RankMemory:
    """Memory of one rank in bytes. peak: the most in use at once, of the device, or of the process on a CPU."""

    rank: int
    weights: int
    gradients: int
    optimizer: int
    peak: int

    @property
    def other(self) -> int:
        """Activations, buffers of collectives, the libraries themselves."""
        return max(self.peak - self.weights - self.gradients - self.optimizer, 0)


@dataclass(frozen=True)
class LoadReport:
    """Global counts of the last window, and their balance.

    tokens: of the window. expected: experts per token where their number is free (ragged), else None.
    """

    counts: LoadCounts
    balance: Balance
    tokens: int
    expected: float | None


@dataclass(frozen=True)
class ClosingReport:
    """Everything the closing report shows.

    reached, planned: steps of the whole run, of which ``steps`` are of this start; it was left where they differ.
    seconds: wall time of the training loop. phase_seconds: per step, by phase; empty if it was not timed. mfu: model
    FLOP utilisation in 0..1, None where the peak of the machine is not known. load: None for a model without experts.
    sample: generated text. notes: lines such as what wandb did. checkpoint: None if none was saved.
    """

    reached: int
    planned: int
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    mfu: float | None
    loss: LossReport
    phase_seconds: Mapping[str, float]
    memory: tuple[RankMemory, ...]
    load: LoadReport | None
    sample: str | None
    notes: tuple[str, ...]
    folder: Path
    metrics: Path
    checkpoint: Path | None


def closing_report(report: ClosingReport, width: int) -> RenderableType:
    """The whole report, at most ``width`` columns wide; to be printed once, by rank 0."""
    left = f"Training was left after step {report.reached} of {report.planned}"
    title = left if report.reached < report.planned else "Training is done"
    parts: list[RenderableType] = [Rule(title), _summary(report), _losses(report.loss)]
    if report.load is not None:
        parts += [load_table(report.load.counts, report.load.balance, width), _balance(report.load)]
    if report.phase_seconds:
        parts.append(_phases(report.phase_seconds))
    parts.append(_memory(report.memory))
    if report.sample is not None:
        parts.append(Group(Text("Sample", style="bold"), Padding(Text(report.sample), (0, 0, 0, 2))))
    parts.append(_paths(report))
    return Group(*[Padding(part, (0, 0, 1, 0)) for part in parts])


def write_report(report: ClosingReport, path: Path) -> None:
    """The same as plain text, without colours."""
    console = Console(file=io.StringIO(), width=PLAIN_WIDTH, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(closing_report(report, PLAIN_WIDTH))
    path.write_text("\n".join(row.rstrip() for row in capture.get().split("\n")), encoding="utf-8")


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """nats / ln 2 / (bytes per token): comparable between tokenizers."""
    return nats_per_token / math.log(2) / bytes_per_token


def _summary(report: ClosingReport) -> Text:
    mfu = "" if report.mfu is None else f", {report.mfu:.1%} of the machine's peak FLOP/s"
    return Text(
        f"{report.steps} steps, {thousands(report.tokens)} tokens in {clock(report.seconds)}: "
        f"{thousands(report.tokens_per_second)} tokens/s{mfu}"
    )


def _losses(loss: LossReport) -> Group:
    table = _table("Loss", "nats/token", "bits/byte")
    rows = [
        ("corpus, unigram entropy", loss.unigram_entropy),
        ("corpus, bigram entropy", loss.bigram_entropy),
        ("train, last window", loss.train),
    ]
    if loss.validation is not None:
        rows.append(("validation", loss.validation))
    for name, nats in rows:
        table.add_row(name, f"{nats:.3f}", f"{bits_per_byte(nats, loss.bytes_per_token):.3f}")
    name, value = ("train", loss.train) if loss.validation is None else ("validation", loss.validation)
    gap = loss.bigram_entropy - value
    if not math.isfinite(value):
        return Group(table, Text(f"The {name} loss is {value}: the run has failed.", style="bold red"))
    verdict = f"The {name} loss is {abs(gap):.3f} nats/token {'below' if gap > 0 else 'ABOVE'} the bigram entropy."
    return Group(table, Text(verdict))


def _balance(load: LoadReport) -> Text:
    """The headline numbers of the layers that received tokens; which did not; experts per token where they are free."""
    balance = load.balance
    empty = [one.layer for one in balance.layers if math.isnan(one.load_max)]
    lines = [f"layer {layer} received no token: its router chose no expert at all" for layer in empty]
    fed = [one for one in balance.layers if one.layer not in empty]
    if fed:
        worst = max(fed, key=lambda one: one.load_max)
        effective = [one.effective_experts for one in fed]
        lines.append(
            f"worst expert {worst.load_max:.2f}x its fair share (layer {worst.layer}), "
            f"busiest rank {max(one.rank_load_max for one in fed):.2f}x, dropped {balance.drop_fraction:.1%}, "
            f"effective experts {sum(effective) / len(fed):.1f} (least {min(effective):.1f}), "
            f"dead experts {balance.dead_experts}"
        )
    if load.expected is not None:
        means = load.counts.assigned_LE.sum(dim=1).double() / load.tokens
        told = ", ".join(f"{mean:.2f} (layer {one.layer})" for one, mean in zip(balance.layers, means, strict=True))
        lines.append(f"experts per token {told}; {load.expected:g} are expected")
    return Text("\n".join(lines), style="bold red" if empty else "")


def _phases(phase_seconds: Mapping[str, float]) -> Table:
    table = _table("Step time", "ms", "share", "")
    total = sum(phase_seconds.values())
    for phase, seconds in sorted(phase_seconds.items(), key=lambda item: -item[1]):
        share = seconds / total
        table.add_row(phase, f"{seconds * 1e3:.1f}", f"{share:.1%}", "█" * round(share * 30))
    table.add_row("all", f"{total * 1e3:.1f}", "", "")
    return table


def _memory(memory: tuple[RankMemory, ...]) -> Table:
    """Of all ranks; of a large job only those with the largest peaks."""
    shown = sorted(sorted(memory, key=lambda one: -one.peak)[:MAX_RANKS], key=lambda one: one.rank)
    which = "" if len(shown) == len(memory) else f"; the fullest {len(shown)} of {len(memory)} ranks"
    table = _table(f"Memory, MiB{which}", "weights", "gradients", "optimizer", "other", "peak")
    for one in shown:
        sizes = (one.weights, one.gradients, one.optimizer, one.other, one.peak)
        table.add_row(f"rank {one.rank}", *[f"{size / MIB:,.0f}" for size in sizes])
    return table


def _paths(report: ClosingReport) -> Table:
    table = Table.grid(padding=(0, 2))
    checkpoint = "none saved" if report.checkpoint is None else str(report.checkpoint)
    rows = [("run folder", str(report.folder)), ("metrics", str(report.metrics)), ("checkpoint", checkpoint)]
    if report.reached < report.planned:
        rows.append(("to go on", f"the same command, with run.id={report.folder.name}"))
    for name, path in [*rows, *[("note", note) for note in report.notes]]:
        table.add_row(name, Text(path, overflow="fold"))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column(title)
    for name in columns:
        table.add_column(name, justify="right" if name else "left")
    return table
