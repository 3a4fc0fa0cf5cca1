"""SwiGLU experts one after the other, with a backward of its own: for a CPU, where a launch costs nothing.

It keeps the tokens and the first product, takes rows from tokens again, recomputes the activation, and writes each
expert's weight gradient into its slice. (Indexing a stacked parameter under autograd would make one full-size zero per
expert.)
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from moetrain.ops.permute import of_assignments, plain_sum, weighted_sum, weights_of_rows
from moetrain.ops.swiglu import swiglu, swiglu_backward
from moetrain.types import Dispatched, RowMap


class Gemm(Protocol):
    """``a b^T``, written to ``out`` where one is given."""

    def __call__(self, a_MK: Tensor, b_NK: Tensor, out: Tensor | None = None) -> Tensor: ...


def loop_swiglu(gemm: Gemm, sent: Dispatched, gate_up_eFD: Tensor, down_eDF: Tensor) -> Tensor:
    """What ``experts_plain`` gives, [C, D]."""
    if sent.rows_per_expert is None:
        sizes = torch.diff(sent.ends_e, prepend=sent.ends_e.new_zeros(1)).tolist()
    else:
        sizes = [sent.rows_per_expert] * gate_up_eFD.shape[0]
    out: Tensor = _LoopSwiglu.apply(gemm, sizes, sent.rows, sent.x_CD, sent.weight_CK, gate_up_eFD, down_eDF)
    return out


class _LoopSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gemm: Gemm,
        sizes: list[int],
        rows: RowMap,
        x_CD: Tensor,
        weight_CK: Tensor | None,
        gate_up_eFD: Tensor,
        down_eDF: Tensor,
    ) -> Tensor:
        token_R, hidden = rows.token_R, []
        y_RD = x_CD.new_empty(token_R.shape[0], x_CD.shape[1])
        blocks = zip(token_R.split(sizes), y_RD.split(sizes), gate_up_eFD, down_eDF, strict=True)
        for of_R, out_RD, gate_up_FD, down_DF in blocks:
            h_RF = gemm(x_CD.index_select(0, of_R), gate_up_FD)
            gemm(swiglu(h_RF), down_DF, out_RD)
            hidden.append(h_RF)
        ctx.gemm, ctx.sizes, ctx.rows = gemm, sizes, rows
        ctx.save_for_backward(x_CD, weight_CK, gate_up_eFD, down_eDF, *hidden)
        return plain_sum(y_RD, rows) if weight_CK is None else weighted_sum(y_RD, weight_CK, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_CD, weight_CK, gate_up_eFD, down_eDF, *hidden = ctx.saved_tensors
        gemm, sizes, rows = ctx.gemm, ctx.sizes, ctx.rows
        token_R, grad_gate_up, grad_down = rows.token_R, torch.empty_like(gate_up_eFD), torch.empty_like(down_eDF)
        grad_RD = x_CD.new_empty(token_R.shape[0], x_CD.shape[1])
        weight_R = None if weight_CK is None else weights_of_rows(weight_CK, rows)
        weights = [None] * len(sizes) if weight_R is None else weight_R.split(sizes)
        dots = []
        for e, (of_R, dx_RD) in enumerate(zip(token_R.split(sizes), grad_RD.split(sizes), strict=True)):
            dy_RD = grads[0].index_select(0, of_R)
            da_RF = gemm(dy_RD, down_eDF[e].t())
            act_RF, dh_RF, dot_R = swiglu_backward(hidden[e], da_RF, weights[e])
            gemm(dy_RD.t(), act_RF.t(), grad_down[e])
            gemm(dh_RF.t(), x_CD.index_select(0, of_R).t(), grad_gate_up[e])
            gemm(dh_RF, gate_up_eFD[e].t(), dx_RD)
            dots += [] if dot_R is None else [dot_R]
        grad_weight_CK = of_assignments(torch.cat(dots), rows) if dots else None
        return None, None, None, plain_sum(grad_RD, rows), grad_weight_CK, grad_gate_up, grad_down
