"""Shared experts, which every token passes, and how their result joins that of the routed ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moetrain.config import ExpertsConfig
from moetrain.moe.experts import FeedForward, activation_of
from moetrain.ops.init import Draw
from moetrain.ops.kernels import Kernels


class SharedExperts(FeedForward):
    """One network of width ``num_shared * expert_dim``.

    ``add``: routed + shared. ``gated``: the shared part times sigmoid(x w^T), shared_gate [1, D] (Qwen2-MoE).
    ``average``: (routed + shared) / 2 (Cohere2-MoE).
    """

    def __init__(
        self, config: ExpertsConfig, dim: int, expert_dim: int, device: torch.device, kernels: Kernels
    ) -> None:
        super().__init__(activation_of(config), dim, config.num_shared * expert_dim, device, kernels)
        self.mode = config.shared_mode
        if self.mode == "gated":
            self.shared_gate = nn.Parameter(torch.empty(1, dim, device=device))

    def init_weights(self, draw: Draw, std: float, std_out: float) -> None:
        super().init_weights(draw, std, std_out)
        if self.mode == "gated":
            draw.normal_(self.shared_gate, "shared_gate", std)

    def forward(self, x_TD: Tensor) -> Tensor:
        """The shared part, [T, D]."""
        shared_TD = super().forward(x_TD)
        if self.mode == "gated":
            return torch.sigmoid(torch.nn.functional.linear(x_TD, self.shared_gate)) * shared_TD
        return shared_TD

    def join(self, routed_TD: Tensor, shared_TD: Tensor) -> Tensor:
        """What the routed experts gave and the shared part, as one."""
        joined_TD = routed_TD + shared_TD
        return joined_TD / 2 if self.mode == "average" else joined_TD
