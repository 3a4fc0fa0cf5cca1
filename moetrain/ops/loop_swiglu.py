"""SwiGLU experts one after the other, with a backward of its own: for a CPU, where a launch costs nothing.

It keeps the rows and the first product, recomputes the activation, and writes each expert's weight gradient into its
slice. (Indexing a stacked parameter under autograd would make one full-size zero per expert.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gemm = Callable[[Tensor, Tensor], Tensor]


def loop_swiglu(
    gemm: Gemm, rows_RD: Tensor, gate_up_eFD: Tensor, down_eDF: Tensor, ends_e: Tensor, rows_per_expert: int | None
) -> Tensor:
    """``down_e (silu(gate_e x) * up_e x)`` for rows grouped by expert -> [R, D]; ``gemm(a, b)`` is ``a b^T``."""
    num_experts = gate_up_eFD.shape[0]
    if rows_per_expert is None:
        sizes = torch.diff(ends_e, prepend=ends_e.new_zeros(1)).tolist()
    else:
        sizes = [rows_per_expert] * num_experts
    out: Tensor = _LoopSwiglu.apply(gemm, sizes, rows_RD, gate_up_eFD, down_eDF)
    return out


class _LoopSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gemm: Gemm, sizes: list[int], rows_RD: Tensor, gate_up_eFD: Tensor, down_eDF: Tensor
    ) -> Tensor:
        out_RD, hidden = torch.empty_like(rows_RD), []
        blocks = zip(rows_RD.split(sizes), out_RD.split(sizes), gate_up_eFD, down_eDF, strict=True)
        for x_RD, y_RD, gate_up_FD, down_DF in blocks:
            h_RF = gemm(x_RD, gate_up_FD)
            gate_RF, up_RF = h_RF.chunk(2, dim=-1)
            y_RD.copy_(gemm(torch.nn.functional.silu(gate_RF).mul_(up_RF), down_DF))
            hidden.append(h_RF)
        ctx.gemm, ctx.sizes = gemm, sizes
        ctx.save_for_backward(rows_RD, gate_up_eFD, down_eDF, *hidden)
        return out_RD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor, Tensor, Tensor]:
        rows_RD, gate_up_eFD, down_eDF, *hidden = ctx.saved_tensors
        grad_rows, grad_gate_up, grad_down = (torch.empty_like(t) for t in (rows_RD, gate_up_eFD, down_eDF))
        blocks = zip(rows_RD.split(ctx.sizes), grads[0].contiguous().split(ctx.sizes), hidden, strict=True)
        for e, ((x_RD, dy_RD, h_RF), dx_RD) in enumerate(zip(blocks, grad_rows.split(ctx.sizes), strict=True)):
            act_RF, dh_RF = _through_activation(h_RF, ctx.gemm(dy_RD, down_eDF[e].t()))
            grad_down[e] = weight_gradient(ctx.gemm, dy_RD, act_RF)
            grad_gate_up[e] = weight_gradient(ctx.gemm, dh_RF, x_RD)
            dx_RD.copy_(ctx.gemm(dh_RF, gate_up_eFD[e].t()))
        return None, None, grad_rows, grad_gate_up, grad_down


def weight_gradient(gemm: Gemm, grad_RO: Tensor, x_RI: Tensor) -> Tensor:
    """``grad^T x``, [O, I]. The left factor of a product is copied where it is a transposed view: let that be the
    narrower.
    """
    if grad_RO.shape[1] > x_RI.shape[1]:
        return gemm(x_RI.t(), grad_RO.t()).t()
    return gemm(grad_RO.t(), x_RI.t())


def _through_activation(h_RF: Tensor, da_RF: Tensor) -> tuple[Tensor, Tensor]:
    """The activation [R, F] again, and the gradient of the first product [R, 2F] from that of the activation."""
    gate_RF, up_RF = h_RF.chunk(2, dim=-1)
    silu_RF = torch.nn.functional.silu(gate_RF)
    dh_RF = torch.empty_like(h_RF)
    dgate_RF, dup_RF = dh_RF.chunk(2, dim=-1)
    torch.mul(da_RF, silu_RF, out=dup_RF)
    torch.ops.aten.silu_backward.grad_input(da_RF.mul_(up_RF), gate_RF, grad_input=dgate_RF)
    return silu_RF.mul_(up_RF), dh_RF
