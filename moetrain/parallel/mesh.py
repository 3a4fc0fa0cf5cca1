"""Who is in which group: the one place that makes process groups and chooses the device.

The whole world is data parallel. EP groups are consecutive ranks, so that experts of one group lie on one host where
that is possible; expert-data-parallel groups, which hold replicas of the same experts, are strided::

    ranks 0..7, ep_size 4:   EP groups [0 1 2 3] [4 5 6 7]     expert-DP groups [0 4] [1 5] [2 6] [3 7]

An EP group that lies on several nodes can be crossed in two hops, along a rail to another node and then within it::

    nodes of 2 ranks:        rails [0 2] [1 3] [4 6] [5 7]     nodes [0 1] [2 3] [4 5] [6 7]
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from moetrain.config import EngineConfig, MachineConfig
from moetrain.parallel.collectives import gather_texts
from moetrain.types import ConfigError, Problem


@dataclass(frozen=True)
class Hop:
    """A way to ``num_places``, each of which has one rank in ``group``; this rank is the one of ``place``."""

    group: ProcessGroup | None
    num_places: int
    place: int


@dataclass(frozen=True)
class Mesh:
    """This rank's place. Groups are None when there is one process and no process group. timeout: theirs, None being
    torch's own.
    """

    rank: int
    world_size: int
    ep_size: int
    device: torch.device
    world_group: ProcessGroup | None = None
    ep_group: ProcessGroup | None = None
    expert_dp_group: ProcessGroup | None = None
    timeout: timedelta | None = None
    _by_node: dict[int, tuple[Hop, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def ep_rank(self) -> int:
        return self.rank % self.ep_size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def hop(self) -> Hop:
        """To any rank of the EP group at once."""
        return Hop(self.ep_group, self.ep_size, self.ep_rank)

    def hops_by_node(self, ranks_per_node: int) -> tuple[Hop, ...]:
        """To any rank of the EP group by way of the rank in this one's place on its node; that of ``hop`` where an EP
        group is within a node, or a node is one rank. Groups are made when they are first asked for. Collective over
        the world.

        Raises ConfigError if ranks ask for different ones.
        """
        if ranks_per_node not in self._by_node:
            self._by_node[ranks_per_node] = _cut_by_node(self, ranks_per_node)
        return self._by_node[ranks_per_node]


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
    _agree("engine.ep_size", ep_size, dist.group.WORLD, "give every host the same words")
    return mesh_of_world(ep_size, device, timeout)


def mesh_of_world(ep_size: int, device: torch.device, timeout: timedelta | None = None) -> Mesh:
    """Cut the already initialised world into EP and expert-DP groups. Collective: all ranks make all groups alike."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    assert world_size % ep_size == 0, (world_size, ep_size)
    ranks = torch.arange(world_size).view(-1, ep_size)
    ep_group, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=timeout)
    expert_dp_group, _ = dist.new_subgroups_by_enumeration(ranks.t().tolist(), timeout=timeout)
    return Mesh(rank, world_size, ep_size, device, dist.group.WORLD, ep_group, expert_dp_group, timeout)


def _cut_by_node(mesh: Mesh, ranks_per_node: int) -> tuple[Hop, ...]:
    if mesh.world_group is None:
        return (mesh.hop,)
    fix = "start as many ranks on every host, or choose dispatch=dedup"
    _agree("dispatch.ranks_per_node", ranks_per_node, mesh.world_group, fix)
    num_nodes, rest = divmod(mesh.ep_size, ranks_per_node)
    if ranks_per_node == 1 or num_nodes <= 1:
        return (mesh.hop,)
    assert rest == 0, "rules.layout lets no other node reach this"
    ranks = torch.arange(mesh.world_size).view(-1, num_nodes, ranks_per_node)
    rails, nodes = ranks.transpose(1, 2).reshape(-1, num_nodes), ranks.view(-1, ranks_per_node)
    rail_group, _ = dist.new_subgroups_by_enumeration(rails.tolist(), timeout=mesh.timeout)
    node_group, _ = dist.new_subgroups_by_enumeration(nodes.tolist(), timeout=mesh.timeout)
    node, place = divmod(mesh.ep_rank, ranks_per_node)
    return Hop(rail_group, num_nodes, node), Hop(node_group, ranks_per_node, place)


def _agree(field: str, value: int, group: ProcessGroup | None, fix: str) -> None:
    """Groups made of different values would wait for each other."""
    asked = gather_texts(str(value), group)
    if len(set(asked)) > 1:
        reason = f"ranks were started with different ones: {', '.join(asked)}"
        raise ConfigError([Problem(field, value, reason, fix)])


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
