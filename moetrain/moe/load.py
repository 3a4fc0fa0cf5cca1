"""Expert load of one layer, counted once: forward assigns, ``commit`` accumulates, eval leaves no trace."""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.moe.counted import Counted
from moetrain.ops.slots import count_experts
from moetrain.types import Placement


class ExpertLoad(Counted[Tensor]):
    """int64 counts [2, E] of assignments before and after dropping."""

    def __init__(self, num_experts: int, device: torch.device) -> None:
        super().__init__(torch.add, torch.zeros(2, num_experts, dtype=torch.int64, device=device))

    @property
    def pending_2E(self) -> Tensor:
        """The counts since the last take."""
        return self._pending

    def record(self, placement: Placement) -> None:
        """Assign the counts of this micro-batch."""
        num_experts = self.pending_2E.shape[1]
        routing = placement.routing
        assigned_E = count_experts(routing.expert_TK, num_experts, routing.valid_TK)
        kept_E = count_experts(routing.expert_TK, num_experts, placement.kept_TK)
        self._latest = torch.stack([assigned_E, kept_E])
