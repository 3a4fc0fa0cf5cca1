"""What it costs to load data and to know what experts do: CPU time of the calls that load, count, sum up and write,
against the step's own.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch

from moetrain.bench.ours import OurStep, on_world
from moetrain.config import Config
from moetrain.data import Corpus
from moetrain.monitor.recorder import CorpusFacts, Recorder
from moetrain.monitor.runfolder import RunFolder
from moetrain.ops.timeline import Timeline
from moetrain.parallel.mesh import Mesh

WARMUP, STEPS, LINES = 3, 20, 8
EVERY_STEP, EVERY_LINE = ("load", "record", "commit", "take", "add"), ("reduce", "write")


class Meter:
    """CPU seconds of this process, all its threads, spent inside of the calls that it wraps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, owner: Any, method: str, name: str) -> None:
        call = getattr(owner, method)

        def inner(*args: Any, **kwargs: Any) -> Any:
            began = process_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + process_time() - began

        setattr(owner, method, inner)

    def of(self, work: Callable[[], object]) -> dict[str, float]:
        """The seconds of ``work`` by name, and all of them as "step"."""
        self.seconds, began = {}, process_time()
        work()
        return {**self.seconds, "step": process_time() - began}


def metrics_bench(config: Config) -> str | None:
    """Train STEPS steps and write LINES lines on the world of the environment; the report on rank 0, None elsewhere."""
    with on_world(config) as (config, mesh, corpus), tempfile.TemporaryDirectory() as folder:
        steps, lines = _measure(config, mesh, corpus, Path(folder))
        return _text(config, mesh, steps, lines) if mesh.is_main else None


def _measure(
    config: Config, mesh: Mesh, corpus: Corpus, folder: Path
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """What each step and each line took, by name of the call."""
    us, meter = OurStep(config, mesh, corpus, Timeline(mesh.device, enabled=False)), Meter()
    facts = CorpusFacts(us.vocab_size, 1.0, 1.0, 1.0, corpus.domains)
    recorder = Recorder(config, mesh, facts, RunFolder(folder), 0) if mesh.is_main else None
    _watch(meter, us, recorder)

    def line(done: int) -> None:
        means = us.window.reduce()
        if recorder is not None:
            recorder.window(done, means, {}, us.model.router_numbers(), {})

    steps, lines = [], []
    for number in range(WARMUP + STEPS):
        began = perf_counter()
        steps.append(meter.of(partial(us.step, number)))
        if recorder is not None:
            recorder.tick(number + 1, perf_counter() - began)
        if number >= WARMUP + STEPS - LINES:
            lines.append(meter.of(partial(line, number + 1)))
    if recorder is not None:
        recorder.end()
    return steps[WARMUP:], lines


def _watch(meter: Meter, us: OurStep, recorder: Recorder | None) -> None:
    for layer in us.model.moe_layers():
        for counter in (layer.load, layer.gauges, layer.domains):
            if counter is not None:
                meter.wrap(counter, "record", "record")
    meter.wrap(us, "load", "load")
    meter.wrap(us.model, "commit_load", "commit")
    meter.wrap(us.model, "take_load", "take")
    meter.wrap(us.model, "take_gauges", "take")
    meter.wrap(us.window, "add", "add")
    meter.wrap(us.window, "add_load", "add")
    meter.wrap(us.window, "reduce", "reduce")
    if recorder is not None:
        meter.wrap(recorder, "window", "write")


def _text(config: Config, mesh: Mesh, steps: list[dict[str, float]], lines: list[dict[str, float]]) -> str:
    """Medians; what happens once a line is shared out over its steps."""
    every = config.monitor.log_every
    per_step = {name: statistics.median(one[name] for one in steps) for name in ("step", *EVERY_STEP)}
    per_line = {name: statistics.median(one[name] for one in lines) / every for name in EVERY_LINE}
    whole = per_step.pop("step")
    rows = [
        f"{mesh.world_size} ranks x {torch.get_num_threads()} threads, {mesh.device}, load {os.getloadavg()[0]:.1f},"
        f" torch {torch.__version__}; rank 0, CPU time, medians of {len(steps)} steps and {len(lines)} lines",
        f"a step      {1e3 * whole:8.2f} ms",
    ]
    costs = per_step | per_line
    shared = dict.fromkeys(EVERY_LINE, f", once in {every} steps")
    rows += [
        f"{name:11} {1e3 * cost:8.3f} ms {cost / whole:8.3%}{shared.get(name, '')}" for name, cost in costs.items()
    ]
    total = sum(costs.values())
    return "\n".join([*rows, f"all of it   {1e3 * total:8.3f} ms {total / whole:8.3%}"])
