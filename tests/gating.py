"""Our routing of given logits, in the forms in which other libraries write theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moetrain.config import BalanceConfig, CapacityConfig
from moetrain.moe.balance import Balance
from moetrain.moe.capacity import Capacity
from moetrain.moe.replay import Replay
from moetrain.moe.routers.token_choice import TokenChoiceRouter
from moetrain.types import LossTerms, Placement, Routing
from tests.tiny import alone, seen, site

E, T = 8, 48
NONE_YET = torch.zeros(E, dtype=torch.int64)


def crowded(num_tokens: int = T, seed: int = 0) -> Tensor:
    """Logits that prefer the later experts, so that some of them overflow."""
    torch.manual_seed(seed)
    return torch.randn(num_tokens, E) + torch.linspace(0, 2, E)


def routed(logits_TE: Tensor, top_k: int, weights: Any) -> Routing:
    """By our router, whose gate is the identity, so that it sees these logits."""
    router = TokenChoiceRouter(site=site(E, E), top_k=top_k, weights=weights)
    torch.nn.init.eye_(router.gate)
    return router(seen(logits_TE), Replay())


def placed(routing: Routing, slots: int, **settings: Any) -> Placement:
    config = CapacityConfig(slots_train=slots, **settings)
    return Capacity(config, E, routing.expert_TK.shape[1], alone())(routing, 1, Replay())


def combine_tensor(placement: Placement) -> Tensor:
    """[T, E, C] of weights, as GShard and DeepSpeed write a routing."""
    assert placement.capacity is not None
    dense = torch.zeros(placement.kept_TK.shape[0], E, placement.capacity)
    for t, k in placement.kept_TK.nonzero().tolist():
        expert, slot = placement.routing.expert_TK[t, k], placement.slot_TK[t, k]
        dense[t, expert, slot] = placement.routing.weight_TK[t, k]
    return dense


def balance_of(routing: Routing, scope: Any = "micro_batch", num_sequences: int = 1) -> LossTerms:
    return Balance(BalanceConfig(scope=scope), E, alone())(routing, num_sequences, NONE_YET)
