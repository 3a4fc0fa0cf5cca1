"""SwiGLU (Shazeer 2020), and its backward from the first product alone."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu(gate_up_RF: Tensor) -> Tensor:
    """[R, 2F] with the gate in the first half -> [R, F]."""
    gate_RF, up_RF = gate_up_RF.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate_RF) * up_RF


def swiglu_backward(
    gate_up_RF: Tensor, grad_RF: Tensor, weight_R: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """For rows that go on as ``weight * swiglu(gate_up)``: that again [R, F], the gradient of gate_up [R, 2F], and that
    of the weights, fp32 [R].

    grad_RF: the gradient of the product before the weight, as it would be at weight 1; it is used up. So the weight's
    own gradient needs no output of the experts (SonicMoE, Guo et al. 2025, takes it the same way).
    """
    gate_RF, up_RF = gate_up_RF.chunk(2, dim=-1)
    silu_RF = torch.nn.functional.silu(gate_RF)
    act_RF = silu_RF * up_RF
    grad_weight_R = None
    if weight_R is not None:
        grad_weight_R = torch.linalg.vecdot(grad_RF.float(), act_RF.float())
        grad_RF.mul_(weight_R.unsqueeze(1))
        act_RF.mul_(weight_R.unsqueeze(1))
    out_RF = torch.empty_like(gate_up_RF)
    dgate_RF, dup_RF = out_RF.chunk(2, dim=-1)
    torch.mul(grad_RF, silu_RF, out=dup_RF)
    torch.ops.aten.silu_backward.grad_input(grad_RF.mul_(up_RF), gate_RF, grad_input=dgate_RF)
    return act_RF, out_RF, grad_weight_R
