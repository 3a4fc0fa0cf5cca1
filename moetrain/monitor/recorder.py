"""Rank 0's pen: every number of a run goes through here to metrics.jsonl, wandb, the live line and the closing
report.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter

from rich.console import Console

from moetrain.checks import traits_of
from moetrain.config import Config
from moetrain.monitor.balance import Balance, summarise
from moetrain.monitor.load_windows import LoadWindows
from moetrain.monitor.progress import Progress, Status
from moetrain.monitor.report import (
    ClosingReport,
    LoadReport,
    LossReport,
    RankMemory,
    closing_report,
    write_report,
)
from moetrain.monitor.rounds import News, Rounds, spoken
from moetrain.monitor.rows import Rows, Timing, losses
from moetrain.monitor.runfiles import RunFiles
from moetrain.monitor.runfolder import RunFolder
from moetrain.monitor.signs import facts_of
from moetrain.monitor.wandb import LayerLoad, WandbLogger, WandbSettings, is_picture_step
from moetrain.monitor.window import WindowMeans
from moetrain.parallel.mesh import Mesh
from moetrain.types import LoadCounts


@dataclasses.dataclass(frozen=True)
class CorpusFacts:
    """What is said of the corpus in the closing report; entropies in nats per token. vocab_size: of the model.

    domains: names of those that are told apart.
    """

    vocab_size: int
    unigram_entropy: float
    bigram_entropy: float
    bytes_per_token: float
    domains: tuple[str, ...] = ()


class Recorder:
    """Made on rank 0 only. ``start``: steps that earlier segments of the run have done."""

    def __init__(self, config: Config, mesh: Mesh, corpus: CorpusFacts, folder: RunFolder, start: int) -> None:
        self._config, self._mesh, self._corpus, self._folder = config, mesh, corpus, folder
        self._rows = Rows(config, mesh, corpus.vocab_size)
        self._rounds = Rounds(facts_of(config, mesh.ep_size))
        self._layers, self._tokens_per_step = self._rows.layers, self._rows.tokens_per_step
        self._load_windows = LoadWindows(config, mesh.ep_size, self._layers, corpus.domains)
        self._files = RunFiles(folder, start, start * self._tokens_per_step)
        if start:
            self.event(start, "resume", f"taken up after step {start} on {mesh.world_size} ranks", {})
        self._progress = Progress(sys.stderr, config.monitor.log_every) if config.monitor.progress else None
        self._wandb = self._open_wandb() if config.monitor.wandb != "off" else None
        self._status = Status(start, config.train.steps)
        self._skipped = 0
        self._shadows: dict[object, str] = {}
        self._started = perf_counter()
        self._first, self._windows = start, 0
        self._seconds = self._steady_seconds = 0.0
        self._steps = self._steady_steps = 0
        self._phases: dict[str, float] = {}
        self._last: WindowMeans | None = None
        self._validation: float | None = None

    def go_back(self, start: int, message: str) -> None:
        """The run goes on after step ``start`` again, which it had passed; what was written since is left out."""
        self._files.reopen(start, start * self._tokens_per_step)
        self.alarm(start, message)
        self._rows = Rows(self._config, self._mesh, self._corpus.vocab_size)
        self._rounds = Rounds(facts_of(self._config, self._mesh.ep_size))
        self._seconds, self._steps = 0.0, 0

    def tick(self, done: int, seconds: float) -> None:
        """Step number ``done`` took ``seconds``."""
        self._seconds += seconds
        self._steps += 1
        self._status = dataclasses.replace(self._status, step=done)
        last = done == self._config.train.steps
        if self._progress is not None and not last and done % self._config.monitor.log_every:
            self._progress.update(self._status)

    def window(
        self,
        done: int,
        means: WindowMeans,
        numbers: Mapping[str, float],
        states: Sequence[Mapping[str, float]],
        phases: Mapping[str, float],
    ) -> None:
        """The window that ends with step ``done``; states: of each MoE layer's router; phases: seconds since the last
        drain.
        """
        row = self._rows.of(means, numbers, states, Timing(self._steps, self._seconds, phases))
        self._write(done, row.numbers)
        if self._wandb is not None and means.load is not None and self._is_picture_step(done):
            tokens = done * self._tokens_per_step
            assigned_LE, kept_LE = means.load.assigned_LE.numpy(), means.load.kept_LE.numpy()
            self._wandb.load(LayerLoad(done, tokens, assigned_LE, kept_LE, self._layers))
        if (load_window := self._load_windows.of(done, self._steps, means)) is not None:
            self._files.loads.write(load_window)
        if (failure := self._files.alarm()) is not None:
            self.alarm(done, failure)
        self._show(done, means, row.tokens_per_second, row.balance)
        self._tell(done, self._rounds.visit(done, row.numbers))
        self._end_window(means, phases)

    def event(self, done: int, kind: str, message: str, data: Mapping[str, object]) -> None:
        """Something that happened after step ``done``; see moetrain.monitor.events. What the cost model of shadows says
        of a layer is told in the report too, the latest of it.
        """
        if data.get("what") in ("rates", "shadows"):
            self._shadows[data.get("layer")] = f"step {done}: {message}"
        self._files.events.write(done, kind, message, data)

    def alarm(self, done: int, message: str) -> None:
        """An event that an operator must see now."""
        self.event(done, "alert", message, {})
        if self._wandb is not None:
            self._wandb.alert(f"{self._folder.id} at step {done}", message, "ERROR")
        self._say(message)

    def skipped(self, done: int, message: str) -> None:
        """Step number ``done`` was bad, and moved nothing."""
        self._skipped += 1
        self.event(done, "skipped", message, {})
        self._say(message)

    def validation(self, done: int, means: WindowMeans) -> None:
        """Mean validation losses after step ``done``."""
        self._validation = means.lm
        self._write(done, {"validation/lm_loss": means.lm, **losses("validation", means)})
        if self._progress is not None:
            self._progress.say(f"step {done}: validation loss {means.lm:.3f}")

    def stop(self, done: int, report: str) -> None:
        """The run ends before its time: why, as an alarm and in report.txt."""
        self.alarm(done, report)
        self._folder.report.write_text(report + "\n", encoding="utf-8")
        self.end()

    def close(self, sample: str | None, memory: tuple[RankMemory, ...], saved: Path | None) -> None:
        """The closing report, to the terminal and to report.txt."""
        notes = self.end()
        if (lost := self._files.note()) is not None:
            notes.append(lost)
        if self._skipped:
            notes.append(f"{self._skipped} steps were skipped: see {self._folder.events}")
        notes += self._shadows.values()
        if self._last is None:
            print(f"nothing to do: {self._folder.path} has done all {self._first} steps")
            return
        report = self._report(self._last, sample, memory, saved, notes)
        Console().print(closing_report(report, shutil.get_terminal_size().columns))
        try:
            write_report(report, self._folder.report)
        except OSError as error:
            self._say(f"{self._folder.report} can not be written: {error.strerror or error}")

    def _say(self, message: str) -> None:
        if self._progress is not None:
            self._progress.say(message)
        else:
            print(f"moetrain: {message}", file=sys.stderr, flush=True)

    def _tell(self, done: int, news: list[News]) -> None:
        """What the doctor has found: an event for each layer, a line and an alert for each name."""
        for one in news:
            self.event(done, "diagnosis", str(one), one.data())
        for line in spoken(news):
            self._say(f"step {done}: {line}")
            if self._wandb is not None:
                self._wandb.alert(f"{self._folder.id} at step {done}", line, "WARN")

    def _write(self, done: int, row: Mapping[str, float]) -> None:
        tokens = done * self._tokens_per_step
        self._files.metrics.write(done, tokens, row)
        if self._wandb is not None:
            self._wandb.scalars(done, tokens, row)

    def _show(self, done: int, means: WindowMeans, tokens_per_second: float, balance: Balance | None) -> None:
        left = (self._config.train.steps - done) * self._tokens_per_step / tokens_per_second
        self._status = Status(
            done,
            self._config.train.steps,
            loss=means.lm,
            tokens_per_second=tokens_per_second,
            seconds_left=left,
            drop_fraction=None if balance is None else balance.drop_fraction,
            load_max=None if balance is None else balance.load_max,
        )
        if self._progress is not None:
            self._progress.update(self._status)

    def _end_window(self, means: WindowMeans, phases: Mapping[str, float]) -> None:
        """Speed and phases are means over all windows but the first, which holds the warming up; unless it is alone."""
        if self._windows == 1:
            self._phases, self._steady_seconds, self._steady_steps = {}, 0.0, 0
        self._windows += 1
        for name, seconds in phases.items():
            self._phases[name] = self._phases.get(name, 0.0) + seconds
        self._steady_seconds += self._seconds
        self._steady_steps += self._steps
        self._last = means
        self._seconds, self._steps = 0.0, 0

    def _report(
        self,
        last: WindowMeans,
        sample: str | None,
        memory: tuple[RankMemory, ...],
        saved: Path | None,
        notes: list[str],
    ) -> ClosingReport:
        corpus, num_steps = self._corpus, self._status.step - self._first
        tokens_per_second = self._steady_steps * self._tokens_per_step / self._steady_seconds
        return ClosingReport(
            reached=self._status.step,
            planned=self._config.train.steps,
            steps=num_steps,
            tokens=num_steps * self._tokens_per_step,
            seconds=perf_counter() - self._started,
            tokens_per_second=tokens_per_second,
            mfu=self._rows.mfu(tokens_per_second),
            loss=LossReport(
                last.lm, self._validation, corpus.unigram_entropy, corpus.bigram_entropy, corpus.bytes_per_token
            ),
            phase_seconds={name: seconds / self._steady_steps for name, seconds in self._phases.items()},
            memory=memory,
            load=None if last.load is None else self._load_report(last.load, last.num_steps),
            sample=sample,
            notes=tuple(notes),
            folder=self._folder.path,
            metrics=self._folder.metrics,
            checkpoint=saved,
        )

    def _load_report(self, load: LoadCounts, num_steps: int) -> LoadReport:
        summary = summarise(load, self._mesh.ep_size, self._layers)
        traits, num_tokens = traits_of(self._config), num_steps * self._tokens_per_step
        return LoadReport(load, summary, num_tokens, traits.experts_per_token if traits.ragged else None)

    def _is_picture_step(self, done: int) -> bool:
        return is_picture_step(done, self._config.train.steps, self._config.monitor.log_every)

    def _open_wandb(self) -> WandbLogger:
        monitor = self._config.monitor
        assert monitor.wandb != "off"
        return WandbLogger(
            WandbSettings(
                mode=monitor.wandb,
                project=monitor.wandb_project,
                group=monitor.wandb_group,
                run_id=self._folder.id,
                folder=self._folder.path,
                config=dataclasses.asdict(self._config),
            )
        )

    def end(self) -> list[str]:
        """Close everything. Returns what wandb did."""
        if self._progress is not None:
            self._progress.close()
        self._files.close()
        if self._wandb is None:
            return []
        outcome = self._wandb.close()
        lines = [f"wandb: {outcome.sent} records sent, {outcome.lost} lost"]
        return lines if outcome.failure is None else [*lines, f"wandb failed: {outcome.failure}"]
