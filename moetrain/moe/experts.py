"""The networks behind the router: stacked experts of this rank, and the plain network that dense layers use."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from moetrain.config import ExpertsConfig
from moetrain.ops.activations import Activation
from moetrain.ops.grouped_mm import add_grouped, grouped_linear
from moetrain.ops.init import Draw
from moetrain.ops.kernels import Kernels
from moetrain.ops.permute import rows_of_tokens, tokens_of_rows, weights_of_rows
from moetrain.types import Dispatched, RowMap


def activation_of(config: ExpertsConfig) -> Activation:
    """What routed experts, shared experts and dense layers have in common."""
    return Activation(config.activation, config.activation_limit)


class Experts(nn.Module):
    """Experts ``first_expert ... first_expert + num_local - 1``, stacked: gate_up [e, 2F, D], down [e, D, F].

    Without a gate the first weight is up [e, F, D]. With biases, also gate_up_bias [e, 2F] (up_bias [e, F]) and
    down_bias [e, D], which the combine weight multiplies like the rest of what the expert gives. It knows nothing of
    ranks: copies of tokens come, and their weighted sums leave in the same order. Stacked weights always take part in
    backward, so an expert without rows has zero gradients, never None.
    """

    def __init__(
        self,
        config: ExpertsConfig,
        dim: int,
        expert_dim: int,
        num_local: int,
        first_expert: int,
        device: torch.device,
        kernels: Kernels,
    ) -> None:
        super().__init__()
        self.first_expert, self.kernels, self.activation = first_expert, kernels, activation_of(config)
        self.first_name, self.has_bias = first_name(self.activation), config.bias
        width = self.activation.num_inputs * expert_dim
        self.register_parameter(self.first_name, nn.Parameter(torch.empty(num_local, width, dim, device=device)))
        self.down = nn.Parameter(torch.empty(num_local, dim, expert_dim, device=device))
        if self.has_bias:
            bias_eF = nn.Parameter(torch.zeros(num_local, width, device=device))
            self.register_parameter(f"{self.first_name}_bias", bias_eF)
            self.down_bias = nn.Parameter(torch.zeros(num_local, dim, device=device))

    def init_weights(self, draw: Draw, std: float, std_out: float) -> None:
        """Biases start at zero."""
        draw.experts_(self.get_parameter(self.first_name), self.first_name, std, self.first_expert)
        draw.experts_(self.down, "down", std_out, self.first_expert)

    def stacks(self) -> tuple[Tensor, ...]:
        """The weights: first, down, and then, if there are any, the biases of either."""
        names = [self.first_name, "down"]
        return tuple(getattr(self, name) for name in names + self.has_bias * [f"{name}_bias" for name in names])

    def forward(self, sent: Dispatched, stacks: tuple[Tensor, ...] | None = None) -> Tensor:
        """For each copy that arrived, the weighted sum of what its experts make of it, [C, D]. stacks: the weights of
        those experts, if they are not its own.
        """
        stacks = stacks or self.stacks()
        if sent.weight_on == "output":
            return self._sums(sent, stacks)
        assert sent.weight_CK is not None
        rows, weight_R = sent.rows, weights_of_rows(sent.weight_CK, sent.rows)
        rows_RD = (rows_of_tokens(sent.x_CD, rows) * weight_R.unsqueeze(1)).to(sent.x_CD.dtype)
        one_each = replace(sent, x_CD=rows_RD, rows=one_row_each(rows_RD), weight_CK=None, weight_on="output")
        return tokens_of_rows(self._sums(one_each, stacks), None, rows)

    def _sums(self, sent: Dispatched, stacks: tuple[Tensor, ...]) -> Tensor:
        assert sent.weight_on == "output"
        (first, down, *biases), groups = stacks, (sent.ends_e, sent.rows_per_expert)
        if self.activation == Activation("swiglu") and not self.has_bias:
            return self.kernels.experts(sent, first, down)
        hidden_RF = grouped_linear(rows_of_tokens(sent.x_CD, sent.rows), first, *groups)
        if biases:
            hidden_RF = add_grouped(hidden_RF, biases[0], *groups)
        y_RD = grouped_linear(self.activation(hidden_RF), down, *groups)
        if biases:
            y_RD = add_grouped(y_RD, biases[1], *groups)
        return tokens_of_rows(y_RD, sent.weight_CK, sent.rows)


def one_row_each(x_RD: Tensor) -> RowMap:
    """The map under which each token is its own row."""
    row_R = torch.arange(x_RD.shape[0], device=x_RD.device)
    return RowMap(row_R, row_R.unsqueeze(1), has_empty=False)


class FeedForward(nn.Module):
    """A dense network: gate_up [2F, D] (without a gate, up [F, D]), down [D, F]; never with biases."""

    def __init__(
        self, activation: Activation, dim: int, hidden_dim: int, device: torch.device, kernels: Kernels
    ) -> None:
        super().__init__()
        self.kernels, self.activation, self.first_name = kernels, activation, first_name(activation)
        first = nn.Parameter(torch.empty(activation.num_inputs * hidden_dim, dim, device=device))
        self.register_parameter(self.first_name, first)
        self.down = nn.Parameter(torch.empty(dim, hidden_dim, device=device))

    def init_weights(self, draw: Draw, std: float, std_out: float) -> None:
        draw.normal_(self.get_parameter(self.first_name), self.first_name, std)
        draw.normal_(self.down, "down", std_out)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        hidden_TF = self.kernels.linear(x_TD, getattr(self, self.first_name))
        return self.kernels.linear(self.activation(hidden_TF), self.down)


def first_name(activation: Activation) -> str:
    """What the weight of the first linear map is called."""
    return "gate_up" if activation.gated else "up"
