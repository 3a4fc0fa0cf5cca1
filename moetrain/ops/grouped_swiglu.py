"""SwiGLU experts by grouped products, all experts in one launch: for an accelerator. No host synchronisation.

Like the loop over experts it keeps the tokens and the first product only: the backward takes rows from tokens again,
recomputes the activation, and has the gradient of the combine weights from that of the activation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moetrain.ops.grouped_mm import grouped_linear, grouped_outer
from moetrain.ops.permute import (
    of_assignments,
    plain_sum,
    take_rows,
    tokens_of_rows_plain,
    weighted_sum,
    weights_of_rows,
)
from moetrain.ops.swiglu import swiglu, swiglu_backward
from moetrain.types import Dispatched, RowMap


def grouped_swiglu(sent: Dispatched, gate_up_eFD: Tensor, down_eDF: Tensor) -> Tensor:
    """What ``experts_plain`` gives, [C, D]."""
    groups = sent.ends_e, sent.rows_per_expert
    out: Tensor = _GroupedSwiglu.apply(sent.rows, groups, sent.x_CD, sent.weight_CK, gate_up_eFD, down_eDF)
    return out


class _GroupedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: RowMap,
        groups: tuple[Tensor, int | None],
        x_CD: Tensor,
        weight_CK: Tensor | None,
        gate_up_eFD: Tensor,
        down_eDF: Tensor,
    ) -> Tensor:
        ctx.rows, ctx.groups = rows, groups
        h_RF = grouped_linear(take_rows(x_CD, rows), gate_up_eFD, *groups)
        y_RD = grouped_linear(swiglu(h_RF), down_eDF, *groups)
        ctx.save_for_backward(x_CD, weight_CK, gate_up_eFD, down_eDF, h_RF)
        return plain_sum(y_RD, rows) if weight_CK is None else weighted_sum(y_RD, weight_CK, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_CD, weight_CK, gate_up_eFD, down_eDF, h_RF = ctx.saved_tensors
        rows, groups = ctx.rows, ctx.groups
        dy_RD = take_rows(grads[0], rows)
        da_RF = grouped_linear(dy_RD, down_eDF.transpose(1, 2), *groups)
        weight_R = None if weight_CK is None else weights_of_rows(weight_CK, rows)
        act_RF, dh_RF, dot_R = swiglu_backward(h_RF, da_RF, weight_R)
        grad_down = grouped_outer(dy_RD, act_RF, *groups)
        grad_gate_up = grouped_outer(dh_RF, take_rows(x_CD, rows), *groups)
        grad_CD = plain_sum(grouped_linear(dh_RF, gate_up_eFD.transpose(1, 2), *groups), rows)
        grad_weight_CK = None if dot_R is None else of_assignments(dot_R, rows)
        return None, None, grad_CD, grad_weight_CK, grad_gate_up, grad_down


def experts_plain(sent: Dispatched, gate_up_eFD: Tensor, down_eDF: Tensor) -> Tensor:
    """The reference of every implementation, left to autograd: for each copy of a token the weighted sum over its rows
    of ``down_e (silu(gate_e x) * up_e x)``, the plain sum without weights.
    """
    sizes = torch.diff(sent.ends_e, prepend=sent.ends_e.new_zeros(1)).tolist()
    blocks = zip(sent.x_CD[sent.rows.token_R].split(sizes), gate_up_eFD.unbind(0), down_eDF.unbind(0), strict=True)
    y_RD = torch.cat([swiglu(x_RD @ gate_up.t()) @ down.t() for x_RD, gate_up, down in blocks])
    ones_CK = torch.ones(sent.rows.row_TK.shape, device=y_RD.device)
    return tokens_of_rows_plain(y_RD, ones_CK if sent.weight_CK is None else sent.weight_CK, sent.rows)
