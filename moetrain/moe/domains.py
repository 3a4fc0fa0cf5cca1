"""Expert load of one layer by the domain that tokens come from, counted once, as ``ExpertLoad`` counts it whole."""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.ops.slots import count_experts
from moetrain.types import Routing


class DomainLoad:
    """int64 counts [D, E] of assignments before dropping, D domains; forward assigns, ``commit`` accumulates."""

    def __init__(self, num_domains: int, num_experts: int, device: torch.device) -> None:
        self._pending_DE = torch.zeros(num_domains, num_experts, dtype=torch.int64, device=device)
        self._latest_DE: Tensor | None = None

    def record(self, routing: Routing, domain_BS: Tensor | None) -> None:
        """Assign the counts of this micro-batch. domain_BS: int64 in [0, D), of the T tokens of ``routing``."""
        assert domain_BS is not None, "a corpus that names domains gives batches that do"
        num_domains, num_experts = self._pending_DE.shape
        cell_TK = domain_BS.reshape(-1, 1) * num_experts + routing.expert_TK
        cells_X = count_experts(cell_TK, num_domains * num_experts, routing.valid_TK)
        self._latest_DE = cells_X.view(num_domains, num_experts)

    def commit(self) -> None:
        """Add the latest micro-batch, once."""
        assert self._latest_DE is not None, "commit() without a training forward since the last commit()"
        self._pending_DE = self._pending_DE + self._latest_DE
        self._latest_DE = None

    def take(self) -> Tensor:
        """The counts since the last take, [D, E]; starts anew."""
        taken_DE, self._pending_DE = self._pending_DE, torch.zeros_like(self._pending_DE)
        return taken_DE
