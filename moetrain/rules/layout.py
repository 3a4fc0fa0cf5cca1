"""The rules of a layout: ranks, expert parallelism, batches, dispatcher, devices."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch

from moetrain.types import Problem, RouterTraits

ALLTOALL = "moetrain.moe.dispatch.alltoall.AllToAllDispatcher"
DEDUP = "moetrain.moe.dispatch.dedup.DedupDispatcher"
HIERARCHICAL = "moetrain.moe.dispatch.hierarchical.HierarchicalDispatcher"
LOCAL = "moetrain.moe.dispatch.local.LocalDispatcher"
PADDED = "moetrain.moe.dispatch.padded.PaddedDispatcher"
SIZES = ("engine.ep_size", "experts.num_experts", "train.micro_batch", "train.global_batch")


def fitted_ep_size(ep_size: int | None, num_experts: int, world: int) -> int:
    """The largest size that divides ranks and experts and is at most ``ep_size``; None: no bound."""
    common = math.gcd(world, num_experts)
    return max(size for size in range(1, min(ep_size or common, common) + 1) if common % size == 0)


def fitted_micro_batch(micro_batch: int, global_batch: int, world: int) -> int | None:
    """The largest of at most ``micro_batch`` that makes up each rank's share; None: there are no equal shares."""
    share, rest = divmod(global_batch, world)
    return None if rest else max(size for size in range(1, min(micro_batch, share) + 1) if share % size == 0)


def fitted(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that ``run.elastic`` puts in the place of those that were typed, as far as it can."""
    of = {key.rpartition(".")[2]: values[key] for key in ("world", *SIZES) if key in values}
    if not values.get("run.elastic") or "world" not in of:
        return {}
    found: dict[str, Any] = {}
    if {"ep_size", "num_experts"} <= of.keys():
        found["engine.ep_size"] = fitted_ep_size(of["ep_size"], of["num_experts"], of["world"])
    if {"micro_batch", "global_batch"} <= of.keys():
        micro_batch = fitted_micro_batch(of["micro_batch"], of["global_batch"], of["world"])
        found |= {} if micro_batch is None else {"train.micro_batch": micro_batch}
    return found


def router_under_ep(traits: RouterTraits, ep_size: int | None, num_experts: int, world: int) -> Problem | None:
    if traits.expert_parallel or (ep_size or math.gcd(world, num_experts)) == 1:
        return None
    reason = "the router needs all experts on every rank"
    return Problem("engine.ep_size", ep_size, reason, "set engine.ep_size=1, or choose another router")


def expert_parallel(ep_size: int | None, num_experts: int, world: int) -> Problem | None:
    if ep_size is None or (world % ep_size == 0 and num_experts % ep_size == 0):
        return None
    undivided = [f"the {_ranks(world)} of this world"] if world % ep_size else []
    undivided += [f"experts.num_experts = {num_experts}"] if num_experts % ep_size else []
    common = math.gcd(world, num_experts)
    works = [str(size) for size in range(1, common + 1) if common % size == 0]
    fix = f"set engine.ep_size={' | '.join(works)}, or null for the largest; run.elastic=true lowers it"
    return Problem("engine.ep_size", ep_size, f"doesn't divide {' nor '.join(undivided)}", fix)


def whole_micro_batches(global_batch: int, micro_batch: int, world: int, elastic: bool) -> Problem | None:
    unit = world * micro_batch
    if global_batch % unit == 0:
        return None
    if elastic:
        return _no_equal_shares(global_batch, world)
    below = global_batch // unit * unit
    works = [str(batch) for batch in (below, below + unit) if batch]
    reason = f"isn't a multiple of {unit}, train.micro_batch = {micro_batch} times the {_ranks(world)}"
    fix = f"set train.global_batch={' or '.join(works)}"
    if (fits := fitted_micro_batch(micro_batch, global_batch, world)) is not None:
        fix += f", or train.micro_batch={fits}; run.elastic=true lowers it"
    return Problem("train.global_batch", global_batch, reason, fix)


def _no_equal_shares(global_batch: int, world: int) -> Problem:
    """What even run.elastic can not fit; with the numbers of ranks that work, up to the first above ``world``."""
    fits = [ranks for ranks in range(1, global_batch + 1) if global_batch % ranks == 0]
    shown = [ranks for ranks in fits if ranks < world] + [ranks for ranks in fits if ranks > world][:1]
    reason = f"can't be shared out evenly among the {_ranks(world)}, whatever train.micro_batch is"
    below = global_batch // world * world
    sizes = " or ".join(str(batch) for batch in (below, below + world) if batch)
    fix = f"start {' | '.join(map(str, shown))} ranks, or set train.global_batch={sizes}"
    return Problem("train.global_batch", global_batch, reason, fix)


def zero_needs_deepspeed(name: str, zero_stage: int) -> Problem | None:
    if name != "local" or zero_stage == 0:
        return None
    reason = "engine.name = local is plain torch and shards nothing"
    return Problem(
        "engine.zero_stage",
        zero_stage,
        reason,
        "set engine.zero_stage=0 (engine=local does both), or choose engine=deepspeed",
    )


def padded_needs_capacity(
    target: str, factor_train: float | None, factor_eval: float | None, scope: str
) -> Problem | None:
    if target != PADDED:
        return None
    for key, factor in (("factor_train", factor_train), ("factor_eval", factor_eval)):
        if factor is None:
            reason = "the padded dispatcher sends a fixed number of slots and can't be dropless"
            return Problem(f"capacity.{key}", factor, reason, "choose dispatch=alltoall, or capacity=seed")
    if scope == "global":
        reason = "the padded dispatcher sends each rank's own slots, so capacity counts per rank or per sequence"
        fix = "set capacity.scope=rank | sequence, or choose dispatch=alltoall"
        return Problem("capacity.scope", scope, reason, fix)
    return None


def local_needs_all_experts(target: str, ep_size: int | None, num_experts: int, world: int) -> Problem | None:
    if target != LOCAL or (ep_size or math.gcd(world, num_experts)) == 1:
        return None
    reason = "the local dispatcher sends nothing, so every rank must hold all experts"
    if ep_size is None:
        reason += f"; null means {math.gcd(world, num_experts)} at {_ranks(world)}"
    return Problem("engine.ep_size", ep_size, reason, "set engine.ep_size=1, or choose dispatch=alltoall")


def ranks_of_node(ranks_per_node: int | None) -> int:
    """``dispatch.ranks_per_node``; null: as many as torchrun has started on this host, 1 where it has not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if ranks_per_node is None else ranks_per_node


def nodes_of_ep_group(ranks_per_node: int | None, ep_size: int | None, num_experts: int, world: int) -> Problem | None:
    field, ranks, common = "dispatch.ranks_per_node", ranks_of_node(ranks_per_node), math.gcd(world, num_experts)
    if ranks < 1:
        return Problem(
            field, ranks_per_node, "a node has one rank at least", f"set {field}=null, or the ranks of a host"
        )
    size = ep_size or common
    if size % ranks == 0 or ranks % size == 0:
        return None
    works = [one for one in range(1, common + 1) if common % one == 0 and (one % ranks == 0 or ranks % one == 0)]
    reason = f"an EP group of {_ranks(size)} (engine.ep_size) is neither so many whole nodes nor an even part of one"
    if ranks_per_node is None:
        reason += f"; null means {ranks} here, which torchrun has started on this host"
    fix = f"set engine.ep_size={' | '.join(map(str, works))}, or choose dispatch=dedup"
    return Problem(field, ranks_per_node, reason, fix)


def some_chunks(chunks: int) -> Problem | None:
    if chunks >= 1:
        return None
    reason = "tokens travel in one part at least"
    return Problem("dispatch.chunks", chunks, reason, "set dispatch.chunks=1, or more to overlap")


def device_present(device: str) -> Problem | None:
    count, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device == "cpu" or (device == "auto" and count == 0) or 0 < ranks <= count:
        return None
    if count == 0:
        return Problem("machine.device", device, "torch sees no CUDA device here", "set machine.device=auto or cpu")
    reason = f"{ranks} ranks on this host, but torch sees {count} CUDA devices, and a device takes one rank"
    return Problem("machine.device", device, reason, f"start --nproc-per-node {count}, or set machine.device=cpu")


def triton_for_experts(
    kernel: str, device: str, activation: str, activation_limit: float | None, bias: bool
) -> Problem | None:
    if kernel != "triton":
        return None
    fix = "set machine.experts_kernel=torch"
    if device == "cpu" or torch.cuda.device_count() == 0:
        return Problem("machine.experts_kernel", kernel, "needs an accelerator, and there is none", fix)
    if find_spec("triton") is None:
        return Problem("machine.experts_kernel", kernel, "Triton is not installed", f"pip install triton, or {fix}")
    if activation != "swiglu" or activation_limit is not None or bias:
        reason = "has kernels for SwiGLU without limit and bias only"
        return Problem("machine.experts_kernel", kernel, reason, fix)
    return None


def _ranks(world: int) -> str:
    return "1 rank" if world == 1 else f"{world} ranks"
