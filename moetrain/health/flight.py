"""Which collectives this rank has begun: torch's flight recorder, read out.

The recorder is part of torch for NCCL and gloo alike, but has no public interface: where it is not there, ``problem``
says so, and whoever prints a report prints that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed import distributed_c10d as c10d

SIZE = "TORCH_FR_BUFFER_SIZE"
FORMER_SIZE = "TORCH_NCCL_TRACE_BUFFER_SIZE"
NUM_KEPT = 2000
NUM_TOLD = 200
DUMPS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
"""Where NCCL's collectives are to be had, if torch was built with it, and everybody's."""


@dataclass(frozen=True)
class Collective:
    """Number ``number`` (from 1) of the group of that name, the same on all its ranks. ended: it is known to be over,
    well or not; gloo marks some as ended that have failed.
    """

    group: str
    number: int
    name: str
    sizes: list[list[int]]
    ended: bool

    def __str__(self) -> str:
        return f"{self.name} {self.sizes}"


@dataclass(frozen=True)
class Flight:
    """ranks: of every group that this rank is in. collectives: the newest, in the order in which they were begun.

    problem: why there are none ("" if there is nothing to be said).
    """

    ranks: Mapping[str, list[int]] = field(default_factory=dict)
    collectives: list[Collective] = field(default_factory=list)
    problem: str = ""


def record_collectives() -> None:
    """Before a process group is made, unless the user has given the recorder a size."""
    if FORMER_SIZE not in os.environ:
        os.environ.setdefault(SIZE, str(NUM_KEPT))


def read() -> Flight:
    """What the recorder holds now. From any thread; it waits for no collective."""
    dumps = [getattr(torch._C._distributed_c10d, name, None) for name in DUMPS]
    raw = [json.loads(dump()) for dump in dumps if dump is not None]
    if not raw:
        return Flight(problem=f"this torch ({torch.__version__}) has no flight recorder that moetrain can read")
    entries = max((one.get("entries", []) for one in raw), key=len)
    if not entries:
        size = os.environ.get(SIZE, os.environ.get(FORMER_SIZE, "not set"))
        return Flight(_ranks(), problem=f"the flight recorder is empty ({SIZE} is {size})")
    return Flight(_ranks(), [_collective(entry) for entry in entries[-NUM_TOLD:]])


def _ranks() -> dict[str, list[int]]:
    """There is no public list of all groups: DeepSpeed makes some of its own."""
    world = c10d._world
    return {name: sorted(world.pg_group_ranks[group]) for group, name in world.pg_names.items()}


def _collective(entry: Mapping[str, Any]) -> Collective:
    return Collective(
        group=entry["process_group"][0],
        number=entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"],
        name=entry["profiling_name"],
        sizes=entry["input_sizes"],
        ended=entry["retired"] or entry["state"] == "completed",
    )
