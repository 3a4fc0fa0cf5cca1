"""The rules that look at two keys or more, or at the machine: pure functions of values that are right by themselves."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moetrain import capacity_rules as capacity
from moetrain import control_rules as control
from moetrain import depth_rules as depth
from moetrain.types import Problem, RouterTraits

LOCAL = "moetrain.moe.dispatch.local.LocalDispatcher"
PADDED = "moetrain.moe.dispatch.padded.PaddedDispatcher"
UNGATED = ("relu", "relu2")
TOKENIZERS = ("kjv", "byte")
WIDTH_UNIT = 8  # values of bf16 in 16 bytes
STEERED = tuple(f"control.{key}" for key in ("target_max_vio", "target_drop", "bias_decay_from", "revive_after_steps"))


@dataclass(frozen=True)
class Rule:
    """``check`` gets the values of ``fields``, in that order, when all of them are known or stood for."""

    fields: tuple[str, ...]
    check: Callable[..., Problem | None]
    otherwise: Mapping[str, Any] = field(default_factory=dict)
    """What stands for fields that not every part has."""


def rule_problems(values: Mapping[str, Any]) -> list[Problem]:
    """What the rules say of ``values``: ``section.key`` -> value, and ``world``. A rule of unknown fields is silent."""
    known = [(rule, {**rule.otherwise, **values}) for rule in RULES]
    found = [
        rule.check(*(of[key] for key in rule.fields)) for rule, of in known if all(key in of for key in rule.fields)
    ]
    return [problem for problem in found if problem is not None]


def top_k_of_experts(top_k: int, num_experts: int, zero_experts: int) -> Problem | None:
    if top_k < 1:
        return Problem("router.top_k", top_k, "a token needs at least one expert", "set router.top_k=1 or more")
    if top_k > num_experts:
        reason = f"a token can't choose {top_k} different experts of {num_experts}"
        if zero_experts:
            reason = f"all that a token chooses may be real experts, of which there are {num_experts}"
            reason += f", whatever the {zero_experts} zero experts take"
        fix = f"set router.top_k={num_experts} or less, or experts.num_experts={top_k} or more"
        return Problem("router.top_k", top_k, reason, fix)
    return None


def sees_no_later_token(traits: RouterTraits, allow_noncausal: bool) -> Problem | None:
    if allow_noncausal or (traits.causal_train and traits.causal_eval):
        return None
    when = "in training" if traits.causal_eval else "in evaluation too"
    reason = f"the router's choice for a token looks at later tokens ({when}), which a causal language model can't"
    fix = "choose another router, or accept that its losses can't be compared: experts.allow_noncausal=true"
    return Problem("experts.allow_noncausal", allow_noncausal, reason, fix)


def gate_to_limit(activation: str, activation_limit: float | None) -> Problem | None:
    if activation_limit is None or activation not in UNGATED:
        return None
    reason = f"experts.activation = {activation} has no gate, and it is gate and up that are clamped"
    fix = "set experts.activation_limit=null, or choose an activation with a gate"
    return Problem("experts.activation_limit", activation_limit, reason, fix)


def shared_to_join(shared_mode: str, num_shared: int) -> Problem | None:
    if shared_mode == "add" or num_shared:
        return None
    reason = "there are no shared experts to join (experts.num_shared = 0)"
    return Problem("experts.shared_mode", shared_mode, reason, "set experts.num_shared=1, or experts.shared_mode=add")


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


def grouped_heads(num_heads: int, num_kv_heads: int) -> Problem | None:
    if num_heads % num_kv_heads == 0:
        return None
    works = [str(heads) for heads in range(1, num_heads + 1) if num_heads % heads == 0]
    reason = f"doesn't divide model.num_heads = {num_heads}"
    return Problem("model.num_kv_heads", num_kv_heads, reason, f"set model.num_kv_heads={' | '.join(works)}")


def even_head(head_dim: int) -> Problem | None:
    if head_dim % 2 == 0:
        return None
    reason = "rotary positions turn pairs of channels, so it must be even"
    return Problem("model.head_dim", head_dim, reason, f"set model.head_dim={head_dim + 1}")


def aligned_width(width: int, *, field: str) -> Problem | None:
    if width % WIDTH_UNIT == 0:
        return None
    reason = f"grouped products need rows of 16 bytes, so it must be a multiple of {WIDTH_UNIT}"
    return Problem(field, width, reason, f"set {field}={-(-width // WIDTH_UNIT) * WIDTH_UNIT}")


def some_moe_layer(first_dense: int, num_layers: int) -> Problem | None:
    if first_dense < num_layers:
        return None
    reason = f"leaves no MoE layer among model.num_layers = {num_layers}"
    return Problem("model.first_dense", first_dense, reason, f"set model.first_dense={num_layers - 1} or less")


def warmup_within_run(warmup_steps: int, steps: int) -> Problem | None:
    if warmup_steps <= steps:
        return None
    reason = f"is longer than the run, train.steps = {steps}"
    return Problem("optim.warmup_steps", warmup_steps, reason, f"set optim.warmup_steps={steps} or less")


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


def devices_of_experts(num_devices: int | None, num_experts: int) -> Problem | None:
    if num_devices is None or num_experts % num_devices == 0:
        return None
    works = [str(devices) for devices in range(1, num_experts + 1) if num_experts % devices == 0]
    reason = f"doesn't divide experts.num_experts = {num_experts}, and groups of experts are equal"
    return Problem("balance.num_devices", num_devices, reason, f"set balance.num_devices={' | '.join(works)}")


def devices_a_token_reaches(devices_per_token: int | None, num_devices: int | None) -> Problem | None:
    if devices_per_token is None or num_devices is None or devices_per_token <= num_devices:
        return None
    reason = f"a token can't reach more than balance.num_devices = {num_devices}"
    fix = f"set balance.devices_per_token={num_devices} or less"
    return Problem("balance.devices_per_token", devices_per_token, reason, fix)


def device_present(device: str) -> Problem | None:
    count, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device == "cpu" or (device == "auto" and count == 0) or 0 < ranks <= count:
        return None
    if count == 0:
        return Problem("machine.device", device, "torch sees no CUDA device here", "set machine.device=auto or cpu")
    reason = f"{ranks} ranks on this host, but torch sees {count} CUDA devices, and a device takes one rank"
    return Problem("machine.device", device, reason, f"start --nproc-per-node {count}, or set machine.device=cpu")


def data_at_path(source: str, path: str | None) -> Problem | None:
    if source == "kjv":
        if path is None:
            return None
        reason = "data.source = kjv ships with moetrain and reads no path"
        return Problem(
            "data.path", path, reason, "choose data=text | jsonl | parquet | hub | bins, or leave data.path out"
        )
    if path is None:
        what = "the name of a data set" if source == "hub" else "a file or a folder"
        reason = f"data.source = {source} needs {what}"
        return Problem("data.path", path, reason, f"set data.path={'owner/name' if source == 'hub' else '/path/to/it'}")
    if source != "hub" and not Path(path).expanduser().exists():
        reason = f"nothing exists at {Path(path).expanduser().absolute()}"
        return Problem("data.path", path, reason, "correct data.path; a relative one starts at the working folder")
    return None


def tokenizer_found(tokenizer: str) -> Problem | None:
    if tokenizer in TOKENIZERS or Path(tokenizer).expanduser().is_file():
        return None
    fix = f"set data.tokenizer={' | '.join(TOKENIZERS)}, or the path of a tokenizer.json"
    return Problem("data.tokenizer", tokenizer, "is no tokenizer that ships, and no file is there", fix)


def _ranks(world: int) -> str:
    return "1 rank" if world == 1 else f"{world} ranks"


RULES = (
    Rule(("router.top_k", "experts.num_experts", "router.zero_experts"), top_k_of_experts, {"router.zero_experts": 0}),
    Rule(("router.traits", "experts.allow_noncausal"), sees_no_later_token),
    Rule(("model.depth_every", "model.num_layers"), depth.some_depth_block),
    Rule(("model.depth_every", "experts.allow_noncausal"), depth.sees_later_tokens),
    Rule(
        ("model.depth_every", "dispatch._target_", "capacity.scope"), partial(depth.varies_in_evaluation, padded=PADDED)
    ),
    Rule(("model.depth_every", "router.over"), depth.mixes_sequences),
    Rule(("experts.activation", "experts.activation_limit"), gate_to_limit),
    Rule(("experts.shared_mode", "experts.num_shared"), shared_to_join),
    Rule(("engine.ep_size", "experts.num_experts", "world"), expert_parallel),
    Rule(("router.traits", "engine.ep_size", "experts.num_experts", "world"), router_under_ep),
    Rule(("train.global_batch", "train.micro_batch", "world"), whole_micro_batches),
    Rule(("model.num_heads", "model.num_kv_heads"), grouped_heads),
    Rule(("model.head_dim",), even_head),
    Rule(("model.dim",), partial(aligned_width, field="model.dim")),
    Rule(("model.expert_dim",), partial(aligned_width, field="model.expert_dim")),
    Rule(("model.first_dense", "model.num_layers"), some_moe_layer),
    Rule(("optim.warmup_steps", "train.steps"), warmup_within_run),
    Rule(("engine.name", "engine.zero_stage"), zero_needs_deepspeed),
    Rule(
        ("dispatch._target_", "capacity.factor_train", "capacity.factor_eval", "capacity.scope"), padded_needs_capacity
    ),
    Rule(("capacity.factor_train", "capacity.slots_train"), partial(capacity.slots_under_a_limit, when="train")),
    Rule(("capacity.factor_eval", "capacity.slots_eval"), partial(capacity.slots_under_a_limit, when="eval")),
    Rule(("capacity.factor_train", "capacity.factor_eval", "capacity.priority"), capacity.priority_under_a_limit),
    Rule(
        ("capacity.factor_train", "capacity.factor_eval", "capacity.renormalise"), capacity.renormalised_under_a_limit
    ),
    Rule(("dispatch._target_", "engine.ep_size", "experts.num_experts", "world"), local_needs_all_experts),
    Rule(("balance.num_devices", "experts.num_experts"), devices_of_experts),
    Rule(("balance.devices_per_token", "balance.num_devices"), devices_a_token_reaches),
    Rule(("control.aux_min", "control.aux_max"), partial(control.bounds_in_order, name="aux")),
    Rule(("control.capacity_min", "control.capacity_max"), partial(control.bounds_in_order, name="capacity")),
    Rule(("control.target_max_vio", "balance.balance_coef"), control.something_to_steer),
    Rule(("control.target_drop", "capacity.factor_train", "capacity.slots_train"), control.capacity_to_steer),
    Rule(("control.bias_decay_from", "router.traits"), control.bias_to_decay),
    Rule(("control.revive_after_steps", "router.traits"), control.experts_to_revive),
    Rule(("train.checkpoint_every", "monitor.log_every", *STEERED), control.saved_with_a_window),
    Rule(("debug.collapsed_router", "router.traits"), control.router_to_collapse),
    Rule(("debug.collapsed_router", "router.logit_bias"), control.bias_to_collapse),
    Rule(("monitor.gradient_ratio_every", "monitor.log_every", "engine.zero_stage"), control.gradients_to_compare),
    Rule(("machine.device",), device_present),
    Rule(("data.source", "data.path"), data_at_path),
    Rule(("data.tokenizer",), tokenizer_found),
)
