"""A whole training step, ours against Hugging Face's Mixtral: same shapes, same tokens, same ranks, interleaved."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass

import torch

from moetrain.bench.hf import HuggingFaceStep
from moetrain.bench.race import WARMUP, Sample, timed
from moetrain.checks import ep_size_of, fitted
from moetrain.config import Config
from moetrain.data import Loader, prepare
from moetrain.engine import make_engine
from moetrain.models.decoder import Decoder
from moetrain.monitor.window import Window
from moetrain.ops.timeline import Timeline
from moetrain.parallel.machine import processor
from moetrain.parallel.mesh import Mesh, close_mesh, init_mesh
from moetrain.resume import choose_kernels

CORE, PRODUCTS_AND_WAITING = ("experts", "attention"), ("exchange", "vocabulary")


@dataclass(frozen=True)
class StepReport:
    """Samples by contestant, seconds of our phases per step, and what both were fed."""

    ours: list[Sample]
    peer: list[Sample]
    phases: dict[str, float]
    tokens: int
    gemm: str


def step_bench(config: Config, rounds: int, alone: bool) -> str | None:
    """Time ``rounds`` interleaved steps of each on the world of the environment, or of ours alone (a peer holds every
    expert on every rank, and may not fit); the report on rank 0, None elsewhere.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    corpus = prepare(config.data, context=config.model.context, vocab_size=config.model.vocab_size)
    vocab_size = config.model.vocab_size or corpus.vocab_size
    config = fitted(config, world_size)
    mesh = init_mesh(ep_size_of(config, world_size), config.machine)
    try:
        accumulation = config.train.global_batch // (mesh.world_size * config.train.micro_batch)
        loader = Loader(
            corpus=corpus,
            context=config.model.context,
            micro_batch=config.train.micro_batch,
            accumulation=accumulation,
            rank=mesh.rank,
            world_size=mesh.world_size,
            seed=config.run.seed,
            mask_documents=False,
        )
        report = _race(config, mesh, vocab_size, loader, rounds, alone)
        return _text(report, mesh) if mesh.is_main else None
    finally:
        close_mesh()


def _race(config: Config, mesh: Mesh, vocab_size: int, loader: Loader, rounds: int, alone: bool) -> StepReport:
    timeline = Timeline(mesh.device)
    kernels = choose_kernels(config, mesh, None)
    model = Decoder(config, mesh, vocab_size, timeline, kernels)
    engine = make_engine(config, model, mesh, loader.accumulation)
    window = Window(mesh)
    batches = [loader.train(0, micro) for micro in range(loader.accumulation)]
    peer = None if alone else HuggingFaceStep(config, vocab_size, mesh.device)

    def our_step() -> None:
        outputs = []
        for micro in range(loader.accumulation):
            timeline.mark("data")
            batch = loader.train(0, micro)
            timeline.mark("rest")
            outputs.append(engine.forward_backward(batch))
            model.commit_load()
        timeline.mark("update")
        engine.step(config.optim.lr)
        timeline.mark("metrics")
        load, gauges = model.take_load(), model.take_gauges()
        for output in outputs:
            window.add(output)
        window.add_load(load, gauges)
        timeline.mark("rest")

    ours: list[Sample] = []
    theirs: list[Sample] = []
    phases: dict[str, float] = {}
    for number in range(WARMUP + rounds):
        timeline.drain()
        mine = timed(our_step, mesh)
        found = timeline.drain()
        other = [] if peer is None else [timed(lambda: peer.step(batches), mesh)]
        if number >= WARMUP:
            ours.append(mine)
            theirs += other
            phases = {name: phases.get(name, 0.0) + seconds / rounds for name, seconds in found.items()}
    tokens = sum(batch.tokens_BS.numel() for batch in batches) * mesh.world_size
    return StepReport(ours, theirs, phases, tokens, kernels.gemm_name)


def _text(report: StepReport, mesh: Mesh) -> str:
    rows = [
        f"{processor()}, {os.cpu_count()} cores, {mesh.world_size} ranks x"
        f" {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, torch {torch.__version__},"
        f" products by {report.gemm}; {report.tokens} tokens a step, {len(report.ours)} interleaved rounds"
    ]
    for name, kind in (("wall", "wall"), ("CPU, most", "cpu")):
        ours, peer = ([1e3 * getattr(sample, kind) for sample in side] for side in (report.ours, report.peer))
        mine = statistics.median(ours)
        row = f"{name:14} ours median {mine:.0f} ms (min {min(ours):.0f})"
        if peer:
            other = statistics.median(peer)
            row += f", HF {other:.0f} ms (min {min(peer):.0f}): ours is {other / mine:.2f}x as fast"
        rows.append(row)
    return "\n".join([*rows, *shares(report.phases)])


def shares(phases: dict[str, float]) -> list[str]:
    """Seconds by phase -> lines: all of them, and what is left without experts and attention, with and without what is
    a product or waits for others.
    """
    total = sum(phases.values())
    share = {name: seconds / total for name, seconds in sorted(phases.items(), key=lambda item: -item[1])}
    besides = 1 - sum(share.get(name, 0.0) for name in CORE)
    outside = besides - sum(share.get(name, 0.0) for name in PRODUCTS_AND_WAITING)
    return [
        f"our step: {', '.join(f'{name} {one:.1%}' for name, one in share.items())}",
        f"neither experts (products, SwiGLU) nor attention (projections, RoPE, scores): {besides:.1%}; of that neither"
        f" exchange (waiting included) nor vocabulary (product, cross-entropy): {outside:.1%}",
    ]
