"""Token-choice routers for tests: 8 experts, random weights, and a step as the trainer would make it."""

from __future__ import annotations

from typing import Any

import torch

from moetrain.moe.replay import Replay
from moetrain.moe.routers.base import StepSeen
from moetrain.moe.routers.token_choice import TokenChoiceRouter
from moetrain.types import Routing
from tests.tiny import complete, seen, site

COUNTS = torch.tensor([10, 2, 4, 4, 0, 4, 4, 4])
NUM_EXPERTS = 8


def router(**own: Any) -> TokenChoiceRouter:
    """With settings that a user may choose, random weights and, where it has one, a random bias."""
    assert TokenChoiceRouter.problems(num_experts=NUM_EXPERTS, **complete(TokenChoiceRouter, **own)) == []
    torch.manual_seed(0)
    made = TokenChoiceRouter(site=site(6, NUM_EXPERTS), **own)
    torch.nn.init.normal_(made.gate)
    if made.gate_bias is not None:
        torch.nn.init.normal_(made.gate_bias)
    if made.bias_E is not None:
        made.bias_E.normal_(std=0.5)
    return made


def routed(made: TokenChoiceRouter, num_tokens: int = 24, seed: int = 1) -> Routing:
    x_TD = torch.randn(num_tokens, 6, generator=torch.Generator().manual_seed(seed))
    return made(seen(x_TD), Replay())


def step(made: TokenChoiceRouter, counts_E: torch.Tensor, statistics_S: torch.Tensor, num: int = 1) -> None:
    made.adjust(StepSeen(0, counts_E[None], statistics_S[None], num))
