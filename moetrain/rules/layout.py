"""The rules of a layout: ranks, expert parallelism, batches, dispatcher, devices."""

from __future__ import annotations

import math
import os

import torch

from moetrain.types import Problem, RouterTraits

LOCAL = "moetrain.moe.dispatch.local.LocalDispatcher"
PADDED = "moetrain.moe.dispatch.padded.PaddedDispatcher"


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
    fix = f"set engine.ep_size={' | '.join(works)}, or null for the largest of them"
    return Problem("engine.ep_size", ep_size, f"doesn't divide {' nor '.join(undivided)}", fix)


def whole_micro_batches(global_batch: int, micro_batch: int, world: int) -> Problem | None:
    unit = world * micro_batch
    if global_batch % unit == 0:
        return None
    below = global_batch // unit * unit
    works = [str(batch) for batch in (below, below + unit) if batch]
    reason = f"isn't a multiple of {unit}, train.micro_batch = {micro_batch} times the {_ranks(world)}"
    return Problem("train.global_batch", global_batch, reason, f"set train.global_batch={' or '.join(works)}")


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


def device_present(device: str) -> Problem | None:
    count, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device == "cpu" or (device == "auto" and count == 0) or 0 < ranks <= count:
        return None
    if count == 0:
        return Problem("machine.device", device, "torch sees no CUDA device here", "set machine.device=auto or cpu")
    reason = f"{ranks} ranks on this host, but torch sees {count} CUDA devices, and a device takes one rank"
    return Problem("machine.device", device, reason, f"start --nproc-per-node {count}, or set machine.device=cpu")


def _ranks(world: int) -> str:
    return "1 rank" if world == 1 else f"{world} ranks"
