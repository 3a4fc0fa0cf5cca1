"""The networks behind the router: stacked SwiGLU experts of this rank, and the plain SwiGLU that dense layers use."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moetrain.ops.grouped_mm import swiglu
from moetrain.ops.init import Draw
from moetrain.ops.kernels import Kernels
from moetrain.types import Dispatched


class Experts(nn.Module):
    """Experts ``first_expert ... first_expert + num_local - 1``, stacked: gate_up [e, 2F, D], down [e, D, F].

    It knows nothing of ranks: rows come grouped by expert and leave in the same order. Stacked weights always take
    part in backward, so an expert without rows has zero gradients, never None.
    """

    def __init__(
        self, dim: int, expert_dim: int, num_local: int, first_expert: int, device: torch.device, kernels: Kernels
    ) -> None:
        super().__init__()
        self.first_expert, self.kernels = first_expert, kernels
        self.gate_up = nn.Parameter(torch.empty(num_local, 2 * expert_dim, dim, device=device))
        self.down = nn.Parameter(torch.empty(num_local, dim, expert_dim, device=device))

    def init_weights(self, draw: Draw, std: float, std_out: float) -> None:
        draw.experts_(self.gate_up, "gate_up", std, self.first_expert)
        draw.experts_(self.down, "down", std_out, self.first_expert)

    def forward(self, sent: Dispatched) -> Tensor:
        """rows_RD -> [R, D]."""
        return self.kernels.experts(sent.rows_RD, self.gate_up, self.down, sent.ends_e, sent.rows_per_expert)


class FeedForward(nn.Module):
    """A dense SwiGLU network: gate_up [2F, D], down [D, F]. Also the shared experts, of width num_shared * F."""

    def __init__(self, dim: int, hidden_dim: int, device: torch.device, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_up = nn.Parameter(torch.empty(2 * hidden_dim, dim, device=device))
        self.down = nn.Parameter(torch.empty(dim, hidden_dim, device=device))

    def init_weights(self, draw: Draw, std: float, std_out: float) -> None:
        draw.normal_(self.gate_up, "gate_up", std)
        draw.normal_(self.down, "down", std_out)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.kernels.linear(swiglu(self.kernels.linear(x_TD, self.gate_up)), self.down)
