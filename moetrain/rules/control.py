"""The rules that ask whether a correction, a planted fault or a measurement has something to act on."""

from __future__ import annotations

import math

from moetrain.rules.layout import PADDED
from moetrain.types import Problem, RouterTraits

GATE_BIAS = "gate_bias"


def bounds_in_order(low: float, high: float, *, name: str) -> Problem | None:
    if low <= high:
        return None
    reason = f"is over control.{name}_max = {high:g}"
    return Problem(f"control.{name}_min", low, reason, f"set control.{name}_min={high:g} or less")


def something_to_steer(target_max_vio: float | None, balance_coef: float) -> Problem | None:
    if target_max_vio is None or balance_coef > 0:
        return None
    reason = "balance.balance_coef = 0, and what is steered by factors never leaves 0"
    fix = "choose balance=default, or set control.target_max_vio=null"
    return Problem("control.target_max_vio", target_max_vio, reason, fix)


def capacity_to_steer(target_drop: float | None, factor_train: float | None, slots_train: int | None) -> Problem | None:
    if target_drop is None or (factor_train is not None and slots_train is None):
        return None
    if factor_train is None:
        reason, fix = "capacity.factor_train = null is dropless", "choose capacity=seed"
    else:
        reason = f"capacity.slots_train = {slots_train} goes before the factor"
        fix = "set capacity.slots_train=null"
    return Problem("control.target_drop", target_drop, reason, f"{fix}, or set control.target_drop=null")


def bias_to_decay(bias_decay_from: float | None, traits: RouterTraits) -> Problem | None:
    if bias_decay_from is None or traits.moves_bias:
        return None
    reason = "the router has no bias that moves with the load"
    fix = "choose router=moonlight, say, or set control.bias_decay_from=null"
    return Problem("control.bias_decay_from", bias_decay_from, reason, fix)


def experts_to_revive(revive_after_steps: int | None, traits: RouterTraits) -> Problem | None:
    if revive_after_steps is None or traits.per_expert:
        return None
    reason = "the router keeps nothing by which an expert could be chosen again"
    return Problem("control.revive_after_steps", revive_after_steps, reason, "set control.revive_after_steps=null")


def experts_to_shadow(
    shadow_gain: float | None, ep_size: int | None, num_experts: int, world: int, elastic: bool
) -> Problem | None:
    if shadow_gain is None or (ep_size or math.gcd(world, num_experts)) > 1 or elastic:
        return None
    reason = "every rank holds all experts (engine.ep_size = 1), so that there is nobody to lend them to"
    return Problem("control.shadow_gain", shadow_gain, reason, "set control.shadow_gain=null, or engine.ep_size=2")


def weights_to_shadow(shadow_gain: float | None, target: str, zero_stage: int) -> Problem | None:
    if shadow_gain is None:
        return None
    if target == PADDED:
        reason = "the padded dispatcher sends the slots of an expert also if nothing is in them"
        return Problem("control.shadow_gain", shadow_gain, reason, "choose dispatch=dedup")
    if zero_stage == 3:
        reason = "engine.zero_stage = 3 leaves no rank with a whole expert to lend"
        return Problem("control.shadow_gain", shadow_gain, reason, "set engine.zero_stage=2")
    return None


def kernels_to_shadow(shadow_gain: float | None, kernel: str) -> Problem | None:
    if shadow_gain is None or kernel != "triton":
        return None
    reason = (
        "not measured together with machine.experts_kernel = triton: kernels are compiled anew for each number of lent "
        "experts"
    )
    fix = "set machine.experts_kernel=torch, or control.shadow_gain=null"
    return Problem("control.shadow_gain", shadow_gain, reason, fix)


def saved_with_a_window(
    checkpoint_every: int,
    log_every: int,
    target_max_vio: float | None,
    target_drop: float | None,
    bias_decay_from: float | None,
    revive_after_steps: int | None,
    shadow_gain: float | None,
) -> Problem | None:
    steered = (target_max_vio, target_drop, bias_decay_from, revive_after_steps, shadow_gain)
    if checkpoint_every % log_every == 0 or all(key is None for key in steered):
        return None
    near = -(-checkpoint_every // log_every) * log_every
    reason = f"is no multiple of monitor.log_every = {log_every}: a resumed run would correct by a window cut short"
    return Problem("train.checkpoint_every", checkpoint_every, reason, f"set train.checkpoint_every={near}")


def router_to_collapse(collapsed_router: bool, traits: RouterTraits) -> Problem | None:
    if not collapsed_router or GATE_BIAS in traits.per_expert:
        return None
    reason = "it is planted in the bias of the router's logits, and this router has none"
    return Problem("debug.collapsed_router", True, reason, "choose router=topk with router.logit_bias=true")


def bias_to_collapse(collapsed_router: bool, logit_bias: bool) -> Problem | None:
    if not collapsed_router or logit_bias:
        return None
    reason = "it is planted in the bias of the router's logits"
    return Problem("debug.collapsed_router", True, reason, "set router.logit_bias=true")


def gradients_to_compare(every: int, log_every: int, zero_stage: int) -> Problem | None:
    field = "monitor.gradient_ratio_every"
    if every and zero_stage == 3:
        reason = "engine.zero_stage = 3 leaves the model without weights to take gradients of"
        return Problem(field, every, reason, f"set engine.zero_stage=2, or {field}=0")
    if every % log_every:
        reason = f"it is measured at log windows, every {log_every} steps"
        return Problem(field, every, reason, f"set {field}={max(every // log_every, 1) * log_every}")
    return None
