"""A routing that a test dictates, by the decision that a replay would bring back."""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.moe.replay import Replay
from moetrain.types import RouterInput, Routing


def forced(router: torch.nn.Module, given: RouterInput, replay: Replay, expert_TK: Tensor) -> Routing:
    """What ``router`` makes of it if each token has chosen ``expert_TK``; not obeyed, the test would test nothing."""
    replay.decisions["chosen"] = expert_TK
    routing: Routing = router(given, replay)
    assert torch.equal(routing.expert_TK, expert_TK), "the router has decided for itself"
    return routing
