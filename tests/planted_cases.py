"""One planted fault for each diagnosis, and routers without a fault."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moetrain.compose import compose
from moetrain.config import Config
from tests.planted import Case, weights
from tests.tiny import ROUTER

WITH_BIAS = {**ROUTER, "logit_bias": True}
FROZEN = {**ROUTER, "bias": "frozen"}
NOISY = {"noise": "gaussian", "noise_scale": 2.0}
SIGN = {**ROUTER, "bias": "sign", "bias_rate": 1.0}
EVEN: Mapping[str, Any] = {"balance__balance_coef": 0.1}
ALONE: Mapping[str, Any] = {"balance__balance_coef": 0.0, "balance__z_coef": 0.0}


def _tilt(*first: float) -> Callable[[Tensor], Tensor]:
    """Of eight experts' logits, the first ones as given."""
    return lambda _: torch.tensor([*first, *[0.0] * (8 - len(first))])


FAULTS = (
    Case("all to two experts", "collapse", ALONE, WITH_BIAS, weights(None, _tilt(20.0, 20.0), "gate_bias")),
    Case("two experts never win", "dead experts", EVEN, FROZEN, weights(None, _tilt(-20.0, -20.0), "bias_E")),
    Case("a bias rate of 1", "oscillating load", ALONE, SIGN),
    Case("slots for half of the tokens", "capacity overflow", {"capacity__factor_train": 0.5}),
    Case(
        "few slots, earlier tokens first",
        "late positions dropped",
        {"capacity__factor_train": 0.8, "capacity__priority": "token_major", "capacity__scope": "sequence"},
    ),
    Case("layer 0 prefers an expert", "first-layer hot spot", EVEN, FROZEN, weights(0, _tilt(20.0), "bias_E")),
    Case("a coefficient of 100", "balance too strong", {"balance__balance_coef": 100.0}),
    Case("the same, measured", "balance too strong", {"balance__balance_coef": 100.0}, measured=True),
    Case(
        "a coefficient of 1e-4 against a tilt",
        "balance too weak",
        {"balance__balance_coef": 1e-4},
        FROZEN | NOISY,
        weights(None, _tilt(8.0), "bias_E"),
    ),
    Case("gates grow", "router logits exploding", ALONE, each_step=weights(None, lambda gate_ED: gate_ED * 1.05)),
    Case(
        "one rank's experts preferred",
        "rank hot spot",
        {**ALONE, "optim__lr": 1e-4},
        FROZEN | NOISY,
        weights(None, _tilt(1.0, 1.0, 1.0, 1.0), "bias_E"),
        ep_size=2,
    ),
)

ROUTERS = {
    "mixtral": "switch",
    "switch": "switch",
    "olmoe": "switch",
    "st_moe": "st_moe",
    "qwen3_moe": "global_batch",
    "deepseek_v3": "sequence",
    "quantile": "none",
    "expert_threshold": "none",
    "noisy_topk": "none",
    "remoe": "none",
    "sinkhorn": "none",
}


def healthy(name: str) -> Case:
    """A router as ``conf/router`` has it, with the balance option it was published with."""
    config: Config = compose([f"router={name}", f"balance={ROUTERS[name]}", "experts.allow_noncausal=true"], 1, None)
    changes = {f"balance__{key}": value for key, value in vars(config.balance).items() if not key.startswith("__")}
    return Case(name, None, {**changes, "experts__allow_noncausal": True}, config.router)
