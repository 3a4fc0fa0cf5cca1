"""What a router promises of a ``Routing``, held against its first one: for routers that are not moetrain's own."""

from __future__ import annotations

import torch

from moetrain.types import Routing

TOLERANCE = 1e-3


def break_of_contract(routing: Routing, num_experts: int) -> str | None:
    """What is wrong with a routing, in words, or None. Reads the device."""
    expert_TK, probs_TE = routing.expert_TK, routing.probs_TE
    shape = tuple(expert_TK.shape)
    if expert_TK.dtype != torch.int64:
        return f"expert_TK is {expert_TK.dtype}, not int64"
    for name, given in (("weight_TK", routing.weight_TK), ("valid_TK", routing.valid_TK)):
        if given is not None and tuple(given.shape) != shape:
            return f"{name} is {tuple(given.shape)}, expert_TK {shape}"
    for name, given in (("probs_TE", probs_TE), ("logits_TE", routing.logits_TE)):
        if tuple(given.shape) != (shape[0], num_experts):
            return f"{name} is {tuple(given.shape)}, not {(shape[0], num_experts)}"
    if expert_TK.numel() == 0:
        return None
    low, high = int(expert_TK.min()), int(expert_TK.max())
    if low < 0 or high >= num_experts:
        return f"expert_TK holds ids from {low} to {high}, but experts are 0 to {num_experts - 1}"
    sorted_TK = expert_TK.sort(dim=1).values
    if bool((sorted_TK[:, 1:] == sorted_TK[:, :-1]).any()):
        return "expert_TK names an expert twice in a row of it"
    error_T = (probs_TE.detach().double().sum(-1) - 1.0).abs()
    if bool((error_T > TOLERANCE).any()):
        return f"rows of probs_TE don't sum to 1, but are off by up to {float(error_T.max()):.3g}"
    return None
