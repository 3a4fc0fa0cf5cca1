"""The router whose logits come from one trained matrix, which most routers are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moetrain.moe.routers.base import Router
from moetrain.ops.init import Draw
from moetrain.types import RouterSite


class GatedRouter(Router):
    """Has ``gate`` [A, D], drawn from a normal distribution, and ``gate_bias`` [A] from 0, or None without
    ``logit_bias``. A is E, or ``num_logits`` where there are logits of more than the experts.
    """

    def __init__(self, site: RouterSite, num_logits: int | None = None, logit_bias: bool = False) -> None:
        super().__init__(site)
        num_logits = num_logits or site.num_experts
        self.gate = nn.Parameter(torch.empty(num_logits, site.dim, device=site.device))
        self.gate_bias = nn.Parameter(torch.zeros(num_logits, device=site.device)) if logit_bias else None

    def init_weights(self, draw: Draw, std: float) -> None:
        draw.normal_(self.gate, "gate", std)

    def logits(self, x_TD: Tensor) -> Tensor:
        """``x W^T + b``, fp32 [T, A] whatever the dtypes of the tokens and of the parameters."""
        bias_A = None if self.gate_bias is None else self.gate_bias.float()
        return linear(x_TD.float(), self.gate.float(), bias_A)
