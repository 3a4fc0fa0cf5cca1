"""Weights & Biases, kept at arm's length: the only file that imports wandb, and only once it is chosen.

Everything that wandb does happens on one daemon thread behind a bounded queue. Training puts plain dicts and arrays
into the queue and never waits: what does not fit is dropped and counted. If wandb can not be imported, does not start,
raises or hangs, training goes on, and ``close`` says what went wrong. metrics.jsonl holds all numbers in any case.

The x axis is always the explicit ``train/step``. wandb's own step counter starts anew when a run is resumed offline,
and drops what is logged below it, so it is never used.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moetrain.monitor.balance import relative_load
from moetrain.monitor.heatmap import DROP, LOAD, heatmap
from moetrain.monitor.jsonl import STEP, TOKENS
from moetrain.monitor.pace import is_spread_step
from moetrain.redaction import redact

log = logging.getLogger(__name__)
QUEUE_SIZE = 256
NUM_PICTURES = 100
POLL_S = 0.2
TITLE_LENGTH = 63
# Else wandb keeps back, for a minute, what has the title of an alert before; 0 would mean that minute too.
NO_WAIT_S = 0.001
# What a table of runs shows of a metric: by default its last value.
SUMMARIES = {
    "balance/load_max": "max,last",
    "balance/effective_experts_min": "min,last",
    "train/lm_loss": "min,last",
    "validation/lm_loss": "min,last",
}
Level = Literal["INFO", "WARN", "ERROR"]


@dataclass(frozen=True)
class WandbSettings:
    """One run of one job. ``folder``: where wandb keeps its files. ``config``: plain types, shown beside the run."""

    mode: Literal["offline", "online"]
    project: str
    group: str | None
    run_id: str
    folder: Path
    config: Mapping[str, Any]
    init_timeout_s: float = 60.0
    finish_timeout_s: float = 60.0


@dataclass(frozen=True)
class WandbOutcome:
    """How it went: records handed to wandb, records lost (queue full or wandb failed), the first failure if any."""

    sent: int
    lost: int
    failure: str | None


@dataclass(frozen=True)
class LayerLoad:
    """Global assignments per expert before and after dropping, int64 [L, E], and the decoder layer of each row."""

    step: int
    tokens: int
    assigned_LE: NDArray[np.int64]
    kept_LE: NDArray[np.int64]
    layers: tuple[int, ...]


@dataclass(frozen=True)
class _Scalars:
    values: dict[str, float]


@dataclass(frozen=True)
class _Alert:
    title: str
    text: str
    level: Level


def is_picture_step(step: int, steps: int, log_every: int) -> bool:
    """Whether this logged step also gets histograms and the heat maps: evenly spread, at most NUM_PICTURES a run
    (wandb slows down beyond 1000 files a run).
    """
    return is_spread_step(step, steps, log_every, NUM_PICTURES)


class WandbLogger:
    """Made on rank 0 only. Every method returns at once, except ``close``, which waits a limited time."""

    def __init__(self, settings: WandbSettings) -> None:
        self._settings = settings
        self._queue: queue.Queue[_Scalars | LayerLoad | _Alert] = queue.Queue(QUEUE_SIZE)
        self._offered = 0
        self._sent = 0
        self._failure: str | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def scalars(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Log numbers after ``step`` steps and ``tokens`` tokens.

        Those of SUMMARIES are left out where they are not finite: wandb's least and greatest would stay NaN for good.
        """
        told = {name: v for name, v in metrics.items() if name not in SUMMARIES or math.isfinite(v)}
        self._offer(_Scalars({STEP: step, TOKENS: tokens, **told}))

    def load(self, load: LayerLoad) -> None:
        """Log one exact histogram of expert counts a layer, and two heat maps. When to: see ``is_picture_step``."""
        self._offer(load)

    def alert(self, title: str, text: str, level: Level) -> None:
        """Tell people: wandb shows it and, if they asked for that, mails it. It takes 63 characters of a title."""
        self._offer(_Alert(title[:TITLE_LENGTH], text, level))

    def close(self) -> WandbOutcome:
        """Send what is queued and finish the run, for at most ``finish_timeout_s``; then leave wandb to itself."""
        self._closing.set()
        self._thread.join(self._settings.finish_timeout_s)
        if self._thread.is_alive():
            self._fail("finish", TimeoutError(f"not done after {self._settings.finish_timeout_s:g} s"))
        return WandbOutcome(self._sent, self._offered - self._sent, self._failure)

    def _offer(self, record: _Scalars | LayerLoad | _Alert) -> None:
        self._offered += 1
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(record)

    def _work(self) -> None:
        try:
            run = self._start()
        except BaseException as error:  # a failing import of a binary wheel may raise anything
            self._fail("start", error)
            return
        while not (self._closing.is_set() and self._queue.empty()):
            try:
                record = self._queue.get(timeout=POLL_S)
            except queue.Empty:
                continue
            try:
                _send(run, record)
                self._sent += 1
            except Exception as error:
                self._fail("log", error)
        try:
            run.finish()
        except Exception as error:
            self._fail("finish", error)

    def _start(self) -> Any:
        import wandb

        s = self._settings
        quiet = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            init_timeout=s.init_timeout_s,
            login_timeout=s.init_timeout_s,
            finish_timeout=s.finish_timeout_s,
        )
        run = wandb.init(
            mode=s.mode,
            project=s.project,
            group=s.group,
            id=s.run_id,
            name=s.run_id,
            resume="allow",
            dir=str(s.folder),
            config=dict(s.config),
            settings=quiet,
        )
        run.define_metric("*", step_metric=STEP)
        for name, summary in SUMMARIES.items():
            run.define_metric(name, step_metric=STEP, summary=summary)
        return run

    def _fail(self, where: str, error: BaseException) -> None:
        """The first failure is remembered and told; a wandb that is down would otherwise fill the log."""
        if self._failure is None:
            self._failure = redact(f"{where}: {type(error).__name__}: {error}")
            log.warning("wandb failed, training goes on without it: %s", self._failure)


def _send(run: Any, record: _Scalars | LayerLoad | _Alert) -> None:
    if isinstance(record, _Alert):
        run.alert(title=record.title, text=record.text, level=record.level, wait_duration=NO_WAIT_S)
    else:
        run.log(record.values if isinstance(record, _Scalars) else _media(record))


def _media(load: LayerLoad) -> dict[str, Any]:
    import wandb

    out: dict[str, Any] = {STEP: load.step, TOKENS: load.tokens}
    edges = np.arange(load.assigned_LE.shape[1] + 1)
    for layer, counts_E in zip(load.layers, load.assigned_LE, strict=True):
        out[f"moe/layer_{layer:02d}/load_hist"] = wandb.Histogram(np_histogram=(counts_E, edges))
    dropped_LE = 1.0 - load.kept_LE / np.where(load.assigned_LE == 0, np.nan, load.assigned_LE)
    relative_LE = relative_load(load.assigned_LE)
    out["moe/load_heatmap"] = wandb.Image(heatmap(relative_LE, load.layers, f"expert load at step {load.step}", LOAD))
    out["moe/drop_heatmap"] = wandb.Image(heatmap(dropped_LE, load.layers, f"dropped at step {load.step}", DROP))
    return out
