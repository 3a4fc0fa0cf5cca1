"""What it costs to load data and to know what experts do: CPU time of the calls that load, count, sum up and write,
against the step's own.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch

from moetrain.checks import ep_size_of, fitted
from moetrain.config import Config
from moetrain.data import Corpus, Loader, prepare
from moetrain.engine import make_engine
from moetrain.models.decoder import Decoder
from moetrain.monitor.recorder import CorpusFacts, Recorder
from moetrain.monitor.runfolder import RunFolder
from moetrain.monitor.window import Window
from moetrain.parallel.mesh import Mesh, close_mesh, init_mesh
from moetrain.resume import choose_kernels

WARMUP, STEPS, LINES = 3, 20, 8
EVERY_STEP, EVERY_LINE = ("load", "record", "commit", "take", "add"), ("reduce", "write")


class Meter:
    """CPU seconds of this process, all its threads, spent inside of the calls that it wraps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, owner: Any, method: str, name: str) -> None:
        setattr(owner, method, self.timed(getattr(owner, method), name))

    def timed(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        """``call``, whose seconds count as ``name``."""

        def inner(*args: Any, **kwargs: Any) -> Any:
            began = process_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + process_time() - began

        return inner

    def of(self, work: Callable[[], object]) -> dict[str, float]:
        """The seconds of ``work`` by name, and all of them as "step"."""
        self.seconds, began = {}, process_time()
        work()
        return {**self.seconds, "step": process_time() - began}


def metrics_bench(config: Config) -> str | None:
    """Train STEPS steps and write LINES lines on the world of the environment; the report on rank 0, None elsewhere."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    corpus = prepare(config.data, context=config.model.context, vocab_size=config.model.vocab_size)
    config = fitted(config, world_size)
    mesh = init_mesh(ep_size_of(config, world_size), config.machine)
    try:
        with tempfile.TemporaryDirectory() as folder:
            steps, lines = _measure(config, mesh, corpus, Path(folder))
        return _text(config, mesh, steps, lines) if mesh.is_main else None
    finally:
        close_mesh()


def _measure(
    config: Config, mesh: Mesh, corpus: Corpus, folder: Path
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """What each step and each line took, by name of the call."""
    kernels = choose_kernels(config, mesh, None)
    vocab_size = config.model.vocab_size or corpus.vocab_size
    model, meter, window = Decoder(config, mesh, vocab_size, None, kernels), Meter(), Window(mesh)
    model.count_domains(len(corpus.domains))
    accumulation = config.train.global_batch // (mesh.world_size * config.train.micro_batch)
    engine = make_engine(config, model, mesh, accumulation)
    loader = Loader(
        corpus=corpus,
        context=config.model.context,
        micro_batch=config.train.micro_batch,
        accumulation=accumulation,
        rank=mesh.rank,
        world_size=mesh.world_size,
        seed=config.run.seed,
        mask_documents=config.data.mask_documents,
    )
    facts = CorpusFacts(vocab_size, 1.0, 1.0, 1.0, corpus.domains)
    recorder = Recorder(config, mesh, facts, RunFolder(folder), 0) if mesh.is_main else None
    _watch(meter, model, window, recorder)
    load = meter.timed(loader.train, "load")

    def step(number: int) -> None:
        outputs = []
        for micro in range(accumulation):
            outputs.append(engine.forward_backward(load(number, micro)))
            model.commit_load()
        engine.step(config.optim.lr)
        counts, gauges = model.take_load(), model.take_gauges()
        for output in outputs:
            window.add(output)
        window.add_load(counts, gauges)

    def line(number: int) -> None:
        means = window.reduce()
        if recorder is not None:
            recorder.window(number, means, {}, model.router_numbers(), {})

    steps, lines = [], []
    for number in range(WARMUP + STEPS):
        began = perf_counter()
        steps.append(meter.of(lambda: step(number)))  # noqa: B023
        if recorder is not None:
            recorder.tick(number + 1, perf_counter() - began)
        if number >= WARMUP + STEPS - LINES:
            lines.append(meter.of(lambda: line(number + 1)))  # noqa: B023
    if recorder is not None:
        recorder.end()
    return steps[WARMUP:], lines


def _watch(meter: Meter, model: Decoder, window: Window, recorder: Recorder | None) -> None:
    for layer in model.moe_layers():
        for counter in (layer.load, layer.gauges, layer.domains):
            if counter is not None:
                meter.wrap(counter, "record", "record")
    meter.wrap(model, "commit_load", "commit")
    meter.wrap(model, "take_load", "take")
    meter.wrap(model, "take_gauges", "take")
    meter.wrap(window, "add", "add")
    meter.wrap(window, "add_load", "add")
    meter.wrap(window, "reduce", "reduce")
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
