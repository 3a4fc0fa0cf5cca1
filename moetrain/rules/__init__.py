"""The rules that look at two keys or more, or at the machine: pure functions of values that are right by themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from moetrain.rules import capacity, control, data, depth, layout, shapes
from moetrain.types import Problem

STEERED = tuple(
    f"control.{key}"
    for key in ("target_max_vio", "target_drop", "bias_decay_from", "revive_after_steps", "shadow_gain")
)


@dataclass(frozen=True)
class Rule:
    """``check`` gets the values of ``fields``, in that order, when all of them are known or stood for."""

    fields: tuple[str, ...]
    check: Callable[..., Problem | None]
    otherwise: Mapping[str, Any] = field(default_factory=dict)
    """What stands for fields that not every part has."""


def rule_problems(values: Mapping[str, Any]) -> list[Problem]:
    """What the rules say of ``values``: ``section.key`` -> value, and ``world``. A rule of unknown fields is silent.

    With ``run.elastic`` they judge what is fitted to the world.
    """
    fitted = layout.fitted(values)
    known = [(rule, {**rule.otherwise, **values, **fitted}) for rule in RULES]
    found = [
        rule.check(*(of[key] for key in rule.fields)) for rule, of in known if all(key in of for key in rule.fields)
    ]
    return [problem for problem in found if problem is not None]


RULES = (
    Rule(
        ("router.top_k", "experts.num_experts", "router.zero_experts"),
        shapes.top_k_of_experts,
        {"router.zero_experts": 0},
    ),
    Rule(("router.traits", "experts.allow_noncausal"), shapes.sees_no_later_token),
    Rule(("model.depth_every", "model.num_layers"), depth.some_depth_block),
    Rule(("model.depth_every", "experts.allow_noncausal"), depth.sees_later_tokens),
    Rule(
        ("model.depth_every", "dispatch._target_", "capacity.scope"),
        partial(depth.varies_in_evaluation, padded=layout.PADDED),
    ),
    Rule(("model.depth_every", "router.over"), depth.mixes_sequences),
    Rule(("experts.activation", "experts.activation_limit"), shapes.gate_to_limit),
    Rule(("experts.shared_mode", "experts.num_shared"), shapes.shared_to_join),
    Rule(("engine.ep_size", "experts.num_experts", "world"), layout.expert_parallel),
    Rule(("router.traits", "engine.ep_size", "experts.num_experts", "world"), layout.router_under_ep),
    Rule(("train.global_batch", "train.micro_batch", "world", "run.elastic"), layout.whole_micro_batches),
    Rule(("model.num_heads", "model.num_kv_heads"), shapes.grouped_heads),
    Rule(("model.head_dim",), shapes.even_head),
    Rule(("model.dim",), partial(shapes.aligned_width, field="model.dim")),
    Rule(("model.expert_dim",), partial(shapes.aligned_width, field="model.expert_dim")),
    Rule(("model.first_dense", "model.num_layers"), shapes.some_moe_layer),
    Rule(("optim.warmup_steps", "train.steps"), shapes.warmup_within_run),
    Rule(("engine.name", "engine.zero_stage"), layout.zero_needs_deepspeed),
    Rule(
        ("dispatch._target_", "capacity.factor_train", "capacity.factor_eval", "capacity.scope"),
        layout.padded_needs_capacity,
    ),
    Rule(("capacity.factor_train", "capacity.slots_train"), partial(capacity.slots_under_a_limit, when="train")),
    Rule(("capacity.factor_eval", "capacity.slots_eval"), partial(capacity.slots_under_a_limit, when="eval")),
    Rule(("capacity.factor_train", "capacity.factor_eval", "capacity.priority"), capacity.priority_under_a_limit),
    Rule(
        ("capacity.factor_train", "capacity.factor_eval", "capacity.renormalise"), capacity.renormalised_under_a_limit
    ),
    Rule(("dispatch._target_", "engine.ep_size", "experts.num_experts", "world"), layout.local_needs_all_experts),
    Rule(("dispatch.ranks_per_node", "engine.ep_size", "experts.num_experts", "world"), layout.nodes_of_ep_group),
    Rule(("dispatch.chunks",), layout.some_chunks),
    Rule(("balance.num_devices", "experts.num_experts"), shapes.devices_of_experts),
    Rule(("balance.devices_per_token", "balance.num_devices"), shapes.devices_a_token_reaches),
    Rule(("control.aux_min", "control.aux_max"), partial(control.bounds_in_order, name="aux")),
    Rule(("control.capacity_min", "control.capacity_max"), partial(control.bounds_in_order, name="capacity")),
    Rule(("control.target_max_vio", "balance.balance_coef"), control.something_to_steer),
    Rule(("control.target_drop", "capacity.factor_train", "capacity.slots_train"), control.capacity_to_steer),
    Rule(("control.bias_decay_from", "router.traits"), control.bias_to_decay),
    Rule(("control.revive_after_steps", "router.traits"), control.experts_to_revive),
    Rule(
        ("control.shadow_gain", "engine.ep_size", "experts.num_experts", "world", "run.elastic"),
        control.experts_to_shadow,
    ),
    Rule(("control.shadow_gain", "dispatch._target_", "engine.zero_stage"), control.weights_to_shadow),
    Rule(("control.shadow_gain", "machine.experts_kernel"), control.kernels_to_shadow),
    Rule(("train.checkpoint_every", "monitor.log_every", *STEERED), control.saved_with_a_window),
    Rule(("debug.collapsed_router", "router.traits"), control.router_to_collapse),
    Rule(("debug.collapsed_router", "router.logit_bias"), control.bias_to_collapse),
    Rule(("monitor.gradient_ratio_every", "monitor.log_every", "engine.zero_stage"), control.gradients_to_compare),
    Rule(("machine.device",), layout.device_present),
    Rule(
        ("machine.experts_kernel", "machine.device", "experts.activation", "experts.activation_limit", "experts.bias"),
        layout.triton_for_experts,
    ),
    Rule(("data.source", "data.path"), data.data_at_path),
    Rule(("data.tokenizer",), data.tokenizer_found),
)
