"""Contestants in turn, round by round, so that what else the machine does hits all of them alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import Any

import torch
import torch.distributed as dist

from moetrain.parallel.collectives import barrier, gather_equal
from moetrain.parallel.mesh import Mesh

WARMUP = 2


@dataclass(frozen=True)
class Contestant:
    """``step`` is what is timed: forward and backward; ``clear`` drops the gradients, outside of it.

    note: what sets it apart, such as tokens that it drops.
    """

    name: str
    step: Callable[[], torch.Tensor]
    clear: Callable[[], None]
    note: str = ""


@dataclass(frozen=True)
class Sample:
    """Seconds of one step: wall clock, all ranks together, and CPU, of the rank that used most."""

    wall: float
    cpu: float


def race(contestants: Sequence[Contestant], mesh: Mesh, rounds: int) -> dict[str, list[Sample]]:
    """``rounds`` samples of each, by name. Collective."""
    samples: dict[str, list[Sample]] = {one.name: [] for one in contestants}
    for number in range(WARMUP + rounds):
        for one in contestants:
            sample = timed(one.step, mesh)
            one.clear()
            if number >= WARMUP:
                samples[one.name].append(sample)
    return samples


def timed(step: Callable[[], object], mesh: Mesh) -> Sample:
    """One step between two barriers. Collective."""
    barrier(mesh.world_group)
    wall, cpu = perf_counter(), process_time()
    step()
    if mesh.device.type != "cpu":
        torch.accelerator.synchronize()
    cpu = process_time() - cpu
    barrier(mesh.world_group)
    return Sample(perf_counter() - wall, most_of(cpu, mesh))


def most_of(number: float, mesh: Mesh) -> float:
    """The largest of all ranks' numbers. Collective."""
    mine = torch.tensor([number], dtype=torch.float64, device=mesh.device)
    return float(gather_equal(mine, mesh.world_group).max())


def bytes_sent(one: Contestant, mesh: Mesh, ranks_per_node: int = 1) -> int:
    """By the exchanges of one step, from this rank to those of other nodes. Collective."""
    if mesh.world_size == 1:
        return 0
    total, exchange, node = [0], dist.all_to_all_single, mesh.rank // ranks_per_node

    def counted(output: torch.Tensor, input: torch.Tensor, *args: Any, **keys: Any) -> Any:
        sends = keys.get("input_split_sizes", args[1] if len(args) > 1 else None)
        group = keys.get("group", args[2] if len(args) > 2 else None)
        nodes = [rank // ranks_per_node for rank in dist.get_process_group_ranks(group)]
        blocks = input.split(sends) if sends else input.chunk(len(nodes))
        total[0] += sum(block.nbytes for to, block in zip(nodes, blocks, strict=True) if to != node)
        return exchange(output, input, *args, **keys)

    dist.all_to_all_single = counted
    try:
        one.step()
    finally:
        one.clear()
        dist.all_to_all_single = exchange
    return total[0]


def median_and_least(samples: Sequence[Sample], kind: str) -> tuple[float, float]:
    """Of the samples' ``kind`` (wall or cpu), in seconds."""
    values = [getattr(sample, kind) for sample in samples]
    return statistics.median(values), min(values)
