"""Who is in which group: the one place that makes process groups and chooses the device.

The whole world is data parallel. EP groups are consecutive ranks, so that experts of one group lie on one host where
that is possible; expert-data-parallel groups, which hold replicas of the same experts, are strided::

    ranks 0..7, ep_size 4:   EP groups [0 1 2 3] [4 5 6 7]     expert-DP groups [0 4] [1 5] [2 6] [3 7]
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from moetrain.config import EngineConfig, MachineConfig
from moetrain.parallel.collectives import gather_texts
from moetrain.types import ConfigError, Problem


@dataclass(frozen=True)
class Mesh:
    """This rank's place. Groups are None when there is one process and no process group."""

    rank: int
    world_size: int
    ep_size: int
    device: torch.device
    world_group: ProcessGroup | None = None
    ep_group: ProcessGroup | None = None
    expert_dp_group: ProcessGroup | None = None

    @property
    def ep_rank(self) -> int:
        return self.rank % self.ep_size

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def choose_device(machine: MachineConfig) -> torch.device:
    """The device of this process: ``machine.device``, auto being CUDA where torch sees it; indexed by LOCAL_RANK."""
    kind = machine.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        return torch.device("cpu")
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")))
    torch.accelerator.set_device_index(device.index)
    return device


def init_mesh(ep_size: int, machine: MachineConfig) -> Mesh:
    """Join the world that torchrun describes in the environment, or stand alone when there is none.

    Raises ValueError if ``ep_size`` does not divide the world (checked before any group is made), and ConfigError if it
    is not the same on all ranks.
    """
    device = choose_device(machine)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size % ep_size:
        raise ValueError(f"engine.ep_size = {ep_size} does not divide the world of {world_size} ranks")
    if "RANK" not in os.environ:
        return Mesh(rank=0, world_size=1, ep_size=1, device=device)
    timeout = timedelta(seconds=machine.timeout_s)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    _await_all(store, rank, world_size, timeout)
    dist.init_process_group(
        backend=dist.get_default_backend_for_device(device),
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=None if device.type == "cpu" else device,
    )
    asked = gather_texts(str(ep_size), dist.group.WORLD)
    if len(set(asked)) > 1:  # groups made of them would wait for each other
        reason = f"ranks were started with different ones: {', '.join(asked)}"
        raise ConfigError([Problem("engine.ep_size", ep_size, reason, "give every host the same words")])
    return mesh_of_world(ep_size, device, timeout)


def mesh_of_world(ep_size: int, device: torch.device, timeout: timedelta | None = None) -> Mesh:
    """Cut the already initialised world into EP and expert-DP groups. Collective: all ranks make all groups alike."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    assert world_size % ep_size == 0, (world_size, ep_size)
    ranks = torch.arange(world_size).view(-1, ep_size)
    ep_group, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=timeout)
    expert_dp_group, _ = dist.new_subgroups_by_enumeration(ranks.t().tolist(), timeout=timeout)
    return Mesh(rank, world_size, ep_size, device, dist.group.WORLD, ep_group, expert_dp_group)


def bound_groups(machine: MachineConfig) -> None:
    """Give every process group there is the timeout, also those that somebody else has made: torch's own default is 10
    minutes for NCCL and 30 for gloo.
    """
    for group in dist.distributed_c10d._world.pg_map:
        group.set_timeout(timedelta(seconds=machine.timeout_s))


def _await_all(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> None:
    """Before any connection between ranks: those would time out, or wait, without a word about who is missing."""
    here = [f"moetrain/here/{one}" for one in range(world_size)]
    store.set(here[rank], "")
    try:
        store.wait(here, timeout)
    except dist.DistStoreError as error:
        missing = [one for one, key in enumerate(here) if not store.check([key])]
        told = f"ranks {missing} of {world_size} have not come within {timeout.total_seconds():.0f} s"
        raise TimeoutError(f"{told} (machine.timeout_s)") from error


def close_mesh() -> None:
    """Leave the process group, if there is one; a later ``init_mesh`` in the same process then works."""
    if dist.is_initialized():
        dist.destroy_process_group()


def weight_dtype(engine: EngineConfig, device: torch.device) -> torch.dtype:
    """The dtype of weights in forward; masters and accumulated gradients are fp32 whatever it is."""
    if engine.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[engine.dtype]
