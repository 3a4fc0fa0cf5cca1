"""Expert load of one layer, counted once: forward assigns, ``commit`` accumulates, eval leaves no trace."""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.ops.slots import count_experts
from moetrain.types import Placement


class ExpertLoad:
    """int64 counts [2, E] of assignments before and after dropping.

    Activation recompute runs forward twice per micro-batch: a counter that forward incremented would double. So forward
    only assigns what this micro-batch saw, and ``commit``, called once after the micro-batch, adds it up.
    """

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self.pending_2E = torch.zeros(2, num_experts, dtype=torch.int64, device=device)
        self._latest_2E: Tensor | None = None

    def record(self, placement: Placement) -> None:
        """Assign the counts of this micro-batch."""
        num_experts = self.pending_2E.shape[1]
        routing = placement.routing
        assigned_E = count_experts(routing.expert_TK, num_experts, routing.valid_TK)
        kept_E = count_experts(routing.expert_TK, num_experts, placement.kept_TK)
        self._latest_2E = torch.stack([assigned_E, kept_E])

    def commit(self) -> None:
        """Add the latest micro-batch, once."""
        assert self._latest_2E is not None, "commit() without a training forward since the last commit()"
        self.pending_2E = self.pending_2E + self._latest_2E
        self._latest_2E = None

    def take(self) -> Tensor:
        """The counts since the last take, [2, E]; starts anew."""
        taken_2E, self.pending_2E = self.pending_2E, torch.zeros_like(self.pending_2E)
        return taken_2E
