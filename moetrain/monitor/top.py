"""``moetrain top``: the newest load of a run as a heat-map in the terminal, for as long as the run goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from moetrain.monitor.balance import Balance, summarise
from moetrain.monitor.expert_load import ExpertLoadReader, LoadWindow
from moetrain.monitor.history import damaged, run_record
from moetrain.monitor.jsonl import STEP, MetricsReader
from moetrain.monitor.progress import Status, clock, line
from moetrain.monitor.runfolder import RunFolder
from moetrain.monitor.tables import load_table
from moetrain.types import LoadCounts

REFRESH_S = 1.0
QUIET_S = 60.0


@dataclass(frozen=True)
class View:
    """What a frame shows. window: the newest one, None before the first. quiet_s: since the last line of the run."""

    id: str
    status: Status
    window: LoadWindow | None
    quiet_s: float

    @property
    def is_over(self) -> bool:
        return self.status.step >= self.status.steps


class Watch:
    """Follows the files of a run; each ``look`` reads only what is new."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError if ``path`` is no run folder."""
        self._folder = RunFolder(path)
        self._steps = int(run_record(self._folder)["config"]["train.steps"])
        self._metrics = MetricsReader(self._folder.metrics)
        self._loads = ExpertLoadReader(self._folder.expert_load)

    def look(self) -> View:
        """Raises ConfigError, naming file and line, if a whole line is damaged."""
        try:
            self._metrics.poll()
            self._loads.poll()
        except ValueError as error:
            raise damaged(self._folder.path, error) from None
        windows, metrics = self._loads.windows(), self._folder.metrics
        written = metrics.stat().st_mtime if metrics.exists() else time.time()
        return View(
            id=self._folder.path.resolve().name,
            status=_status(self._metrics.rows(), self._steps),
            window=windows[-1] if windows else None,
            quiet_s=max(time.time() - written, 0.0),
        )


def top(run: Path, once: bool, console: Console) -> int:
    """Redraw every second until the run is over or Ctrl-C is pressed; draw once with ``once``, and where ``console`` is
    no terminal, such as a file or a pipe. Returns the exit code.

    Raises ConfigError if ``run`` is no run folder, or if a whole line in it is damaged.
    """
    watch = Watch(run)
    view = watch.look()
    if once or view.is_over or not console.is_terminal:
        console.print(frame(view, console))
        return 0
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(frame(view, console), refresh=True)
            if view.is_over:
                break
            time.sleep(REFRESH_S)
            view = watch.look()
    return 0


def frame(view: View, console: Console) -> RenderableType:
    """As wide as the console and one line less high, with fewer layers if need be; one layer is always shown."""
    num_layers = 0 if view.window is None else len(view.window.layers)
    whole = _frame(view, console.width, num_layers)
    too_high = len(console.render_lines(whole, pad=False)) - (console.height - 1)
    return whole if too_high <= 0 else _frame(view, console.width, max(num_layers - too_high - 1, 1))


def _frame(view: View, width: int, num_layers: int) -> RenderableType:
    """With ``num_layers`` layers; a line more if these are not all."""
    parts = [_cut(f"{view.id}: {_state(view)}"), _cut(line(view.status))]
    if view.window is None:
        return Group(*parts, Text("no expert load is recorded yet"))
    counts, balance = _balance(view.window)
    shown = _busiest(balance, num_layers)
    if len(shown) < len(balance.layers):
        parts.append(_cut(f"{len(shown)} of {len(balance.layers)} layers: those with the busiest experts"))
    some = LoadCounts(counts.assigned_LE[shown], counts.kept_LE[shown])
    table = load_table(some, dataclasses.replace(balance, layers=tuple(balance.layers[i] for i in shown)), width)
    first = view.window.step - view.window.num_steps + 1
    return Group(*parts, table, _cut(f"{_summary(balance)}, steps {first} to {view.window.step}"))


def _cut(text: str) -> Text:
    """One line, whatever its length."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def _state(view: View) -> str:
    if view.is_over:
        return "the run is over"
    return f"nothing new for {clock(view.quiet_s)}" if view.quiet_s > QUIET_S else "running"


def _status(rows: Sequence[dict[str, float]], steps: int) -> Status:
    """The newest value of everything that the line shows."""

    def newest(name: str) -> float | None:
        return next((row[name] for row in reversed(rows) if name in row), None)

    return Status(
        step=int(newest(STEP) or 0),
        steps=steps,
        loss=newest("train/lm_loss"),
        tokens_per_second=newest("perf/tokens_per_second"),
        drop_fraction=newest("balance/drop_fraction"),
        load_max=newest("balance/load_max"),
    )


def _balance(window: LoadWindow) -> tuple[LoadCounts, Balance]:
    counts = LoadCounts(torch.from_numpy(window.assigned_LE), torch.from_numpy(window.kept_LE))
    return counts, summarise(counts, window.ep_size, window.layers)


def _busiest(balance: Balance, room: int) -> list[int]:
    """Rows of the layers whose busiest experts have most, as many as there is room for, in order of layers."""
    order = np.argsort([-one.load_max for one in balance.layers], kind="stable")
    return sorted(int(row) for row in order[:room])


def _summary(balance: Balance) -> str:
    return (
        f"effective experts {balance.effective_experts_mean:.1f} (least {balance.effective_experts_min:.1f}), "
        f"dead {balance.dead_experts}, busiest rank {balance.rank_load_max:.2f}x"
    )
