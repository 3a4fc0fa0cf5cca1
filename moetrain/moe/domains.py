"""Expert load of one layer by the domain that tokens come from, counted once, as ``ExpertLoad`` counts it whole."""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.moe.counted import Counted
from moetrain.ops.slots import count_experts
from moetrain.types import Routing


class DomainLoad(Counted[Tensor]):
    """int64 counts [D, E] of assignments before dropping, D domains."""

    def __init__(self, num_domains: int, num_experts: int, device: torch.device) -> None:
        self._shape = num_domains, num_experts
        super().__init__(torch.add, torch.zeros(self._shape, dtype=torch.int64, device=device))

    def record(self, routing: Routing, domain_BS: Tensor | None) -> None:
        """Assign the counts of this micro-batch. domain_BS: int64 in [0, D), of the T tokens of ``routing``."""
        assert domain_BS is not None, "a corpus that names domains gives batches that do"
        num_domains, num_experts = self._shape
        cell_TK = domain_BS.reshape(-1, 1) * num_experts + routing.expert_TK
        cells_X = count_experts(cell_TK, num_domains * num_experts, routing.valid_TK)
        self._latest = cells_X.view(num_domains, num_experts)
