"""Rules of Mixture of Depths: in evaluation each sequence sends another number of tokens through a block."""

from __future__ import annotations

from moetrain.types import Problem


def some_depth_block(depth_every: int, num_layers: int) -> Problem | None:
    if depth_every <= num_layers:
        return None
    reason = f"leaves no block that tokens may pass by among model.num_layers = {num_layers}"
    return Problem(
        "model.depth_every", depth_every, reason, f"set model.depth_every={num_layers} or less, or 0 for none"
    )


def sees_later_tokens(depth_every: int, allow_noncausal: bool) -> Problem | None:
    if allow_noncausal or depth_every == 0:
        return None
    reason = (
        f"in training, model.depth_every = {depth_every} compares a token with later ones to choose who goes through a"
        " block, which a causal language model can't (evaluation is causal: it asks a predictor)"
    )
    fix = "set model.depth_every=0, or accept that training losses can't be compared: experts.allow_noncausal=true"
    return Problem("experts.allow_noncausal", allow_noncausal, reason, fix)


def varies_in_evaluation(depth_every: int, target: str, scope: str, *, padded: str) -> Problem | None:
    if depth_every == 0 or (target != padded and scope == "rank"):
        return None
    reason = "in evaluation each rank and each sequence has another number of tokens that go through a block"
    if target == padded:
        fix = "choose dispatch=alltoall, or set model.depth_every=0"
        return Problem("dispatch._target_", target, f"{reason}, and padded buffers have one size", fix)
    fix = "set capacity.scope=rank, or model.depth_every=0"
    return Problem("capacity.scope", scope, f"{reason}, so their slots can't be counted together", fix)


def mixes_sequences(depth_every: int, over: str) -> Problem | None:
    if depth_every == 0 or over != "sequence":
        return None
    reason = (
        f"with model.depth_every = {depth_every}, evaluation feeds a block the tokens that go through it without regard"
        " to their sequences, each of which has another number of them"
    )
    return Problem("router.over", over, reason, "set router.over=micro_batch, or model.depth_every=0")
