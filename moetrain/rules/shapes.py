"""The rules of the sizes of a model, and of a run."""

from __future__ import annotations

from moetrain.types import Problem, RouterTraits

UNGATED = ("relu", "relu2")
WIDTH_UNIT = 8  # values of bf16 in 16 bytes


def sees_no_later_token(traits: RouterTraits, allow_noncausal: bool) -> Problem | None:
    if allow_noncausal or (traits.causal_train and traits.causal_eval):
        return None
    when = "in training" if traits.causal_eval else "in evaluation too"
    reason = f"the router's choice for a token looks at later tokens ({when}), which a causal language model can't"
    fix = "choose another router, or accept that its losses can't be compared: experts.allow_noncausal=true"
    return Problem("experts.allow_noncausal", allow_noncausal, reason, fix)


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
