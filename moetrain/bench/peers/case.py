"""What every contestant is given: one layer's weights and tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moetrain.bench.race import Contestant
from moetrain.parallel.mesh import Mesh

AUX_COEF = 0.01


@dataclass(frozen=True)
class LayerCase:
    """One MoE layer, the same for everybody. x_TD and weights are in ``dtype``: gate_ED, and of the experts of this
    rank gate_up_eFD [e, 2F, D] and down_eDF [e, D, F]. grad_TD: of the output.
    """

    x_TD: Tensor
    grad_TD: Tensor
    gate_ED: Tensor
    gate_up_eFD: Tensor
    down_eDF: Tensor
    top_k: int
    mesh: Mesh

    @property
    def num_experts(self) -> int:
        return self.gate_ED.shape[0]

    def contestant(
        self, name: str, module: nn.Module, run: Callable[[Tensor], tuple[Tensor, Tensor]], note: str = ""
    ) -> Contestant:
        """run: x_TD -> (output, balance loss as the library has it)."""
        x_TD = self.x_TD.clone().requires_grad_()

        def step() -> Tensor:
            out_TD, aux = run(x_TD)
            torch.autograd.backward([out_TD, AUX_COEF * aux], [self.grad_TD, torch.ones_like(aux)])
            return out_TD.detach()

        def clear() -> None:
            x_TD.grad = None
            module.zero_grad(set_to_none=True)

        return Contestant(name, step, clear, note)
