"""A whole training step, ours against Hugging Face's Mixtral: same shapes, same tokens, same ranks, interleaved."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass, replace
from functools import partial

import torch

from moetrain.bench.hf import HuggingFaceStep
from moetrain.bench.ours import OurStep, on_world
from moetrain.bench.race import WARMUP, Sample, timed
from moetrain.config import Config
from moetrain.data import Corpus
from moetrain.ops.timeline import Timeline
from moetrain.parallel.machine import processor
from moetrain.parallel.mesh import Mesh

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
    """Time ``rounds`` interleaved steps of each on the world of the environment, the first ones of a run, or of ours
    alone (a peer holds every expert on every rank, and may not fit); the report on rank 0, None elsewhere.
    """
    config = replace(config, data=replace(config.data, mask_documents=False))  # the peer knows of no documents
    with on_world(config) as (config, mesh, corpus):
        report = _race(config, mesh, corpus, rounds, alone)
        return _text(report, mesh) if mesh.is_main else None


def _race(config: Config, mesh: Mesh, corpus: Corpus, rounds: int, alone: bool) -> StepReport:
    timeline = Timeline(mesh.device)
    us = OurStep(config, mesh, corpus, timeline)
    peer = None if alone else HuggingFaceStep(config, us.vocab_size, mesh.device)
    ours: list[Sample] = []
    theirs: list[Sample] = []
    phases: dict[str, float] = {}
    for number in range(WARMUP + rounds):
        timeline.drain()
        mine = timed(partial(us.step, number), mesh)
        found = timeline.drain()
        other: list[Sample] = []
        if peer is not None:
            batches = [us.loader.train(number, micro) for micro in range(us.loader.accumulation)]
            other = [timed(partial(peer.step, batches), mesh)]
        if number >= WARMUP:
            ours.append(mine)
            theirs += other
            phases = {name: phases.get(name, 0.0) + seconds / rounds for name, seconds in found.items()}
    tokens = config.train.global_batch * config.model.context
    return StepReport(ours, theirs, phases, tokens, us.model.kernels.gemm_name)


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
