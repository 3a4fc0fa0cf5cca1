"""The forward and the backward of SwiGLU experts as launches of Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from moetrain.ops import triton_kernels
from moetrain.ops.permute import of_assignments
from moetrain.ops.triton_tiles import BLOCK_F
from moetrain.types import RowMap

Grid = Callable[[dict[str, int]], tuple[int]]
SUM_ROWS, SUM_DIM = 8, 512


@dataclass(frozen=True)
class Groups:
    """Which rows are whose, and what every kernel is told of it. ends_e: int32, cumulative."""

    rows: RowMap
    ends_e: Tensor

    @property
    def num_rows(self) -> int:
        return self.rows.assignment_R.shape[0]

    def grid(self, num_cols: int) -> Grid:
        """Programs for every tile that there can be, however rows are spread over experts."""
        num_rows, num_experts = self.num_rows, self.ends_e.shape[0]
        return lambda tile: ((num_rows // tile["BLOCK_M"] + num_experts) * triton.cdiv(num_cols, tile["BLOCK_N"]),)

    def keys(self, dim: int, width: int) -> dict[str, int]:
        num_experts = self.ends_e.shape[0]
        size_class = (self.num_rows // num_experts).bit_length()
        given = {"size_class": size_class, "NUM_EXPERTS": num_experts, "DIM": dim, "WIDTH": width}
        return given | {"enable_fp_fusion": True}

    def token_keys(self) -> dict[str, int]:
        """For those which look for a row's token."""
        return {"num_assignments": self.rows.row_TK.numel(), "TOP_K": self.rows.row_TK.shape[1]}


class TritonSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        groups: Groups,
        x_CD: Tensor,
        weight_CK: Tensor | None,
        gate_up_eFD: Tensor,
        down_eDF: Tensor,
    ) -> Tensor:
        _, dim, width = down_eDF.shape
        h_RF, act_RF = x_CD.new_empty(groups.num_rows, 2 * width), x_CD.new_empty(groups.num_rows, width)
        triton_kernels.gathered_swiglu[groups.grid(width)](
            x_CD,
            groups.rows.assignment_R,
            gate_up_eFD,
            groups.ends_e,
            h_RF,
            act_RF,
            **groups.token_keys(),
            **groups.keys(dim, width),
        )
        ctx.groups = groups
        ctx.save_for_backward(x_CD, weight_CK, gate_up_eFD, down_eDF, h_RF)
        return _gather_sum(_rows_product(act_RF, down_eDF, (width, 1), groups), weight_CK, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_CD, weight_CK, gate_up_eFD, down_eDF, h_RF = ctx.saved_tensors
        groups, grad_CD = ctx.groups, grads[0].contiguous()
        _, dim, width = down_eDF.shape
        dh_RF, act_RF, dot_R = _activation_backward(grad_CD, weight_CK, down_eDF, h_RF, groups)
        grad_down = _weights_product(act_RF, grad_CD, down_eDF, (1, width), groups)
        grad_gate_up = _weights_product(dh_RF, x_CD, gate_up_eFD, (dim, 1), groups)
        grad_x = _gather_sum(_rows_product(dh_RF, gate_up_eFD, (1, dim), groups), None, groups)
        grad_weight = None if weight_CK is None else of_assignments(dot_R, groups.rows)
        return None, grad_x, grad_weight, grad_gate_up, grad_down


def _rows_product(left_RW: Tensor, weight_eXX: Tensor, strides: tuple[int, int], groups: Groups) -> Tensor:
    """[R, W] to [R, D]; strides: in an expert's weight, of D and of W."""
    width = left_RW.shape[1]
    dim = weight_eXX[0].numel() // width
    out_RD = left_RW.new_empty(groups.num_rows, dim)
    triton_kernels.rows_product[groups.grid(dim)](
        left_RW,
        weight_eXX,
        groups.ends_e,
        out_RD,
        STRIDE_D=strides[0],
        STRIDE_W=strides[1],
        **groups.keys(dim, width),
    )
    return out_RD


def _activation_backward(
    grad_CD: Tensor, weight_CK: Tensor | None, down_eDF: Tensor, h_RF: Tensor, groups: Groups
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of h [R, 2F], the weighted activation [R, F], the gradient of each row's weight, fp32 [R]."""
    _, dim, width = down_eDF.shape
    dh_RF, act_RF = torch.empty_like(h_RF), h_RF.new_empty(groups.num_rows, width)
    dot_BR = h_RF.new_empty(2 * triton.cdiv(width, 2 * BLOCK_F), groups.num_rows, dtype=torch.float32)
    triton_kernels.activation_backward[groups.grid(triton.cdiv(width, 2))](
        grad_CD,
        groups.rows.assignment_R,
        weight_CK,
        down_eDF,
        groups.ends_e,
        h_RF,
        dh_RF,
        act_RF,
        dot_BR,
        num_rows=groups.num_rows,
        WEIGHTED=weight_CK is not None,
        **groups.token_keys(),
        **groups.keys(dim, width),
    )
    return dh_RF, act_RF, dot_BR.sum(0)


def _weights_product(
    left_RW: Tensor, x_CD: Tensor, weight_eXX: Tensor, strides: tuple[int, int], groups: Groups
) -> Tensor:
    """The gradient of a stacked weight, in its shape; strides: in an expert's weight, of W and of D."""
    dim, width = x_CD.shape[1], left_RW.shape[1]
    grad_eXX = torch.empty_like(weight_eXX)
    num_experts = weight_eXX.shape[0]

    def grid(tile: dict[str, int]) -> tuple[int]:
        return (num_experts * triton.cdiv(width, tile["BLOCK_M"]) * triton.cdiv(dim, tile["BLOCK_N"]),)

    triton_kernels.weights_product[grid](
        left_RW,
        x_CD,
        groups.rows.assignment_R,
        groups.ends_e,
        grad_eXX,
        STRIDE_W=strides[0],
        STRIDE_D=strides[1],
        **groups.token_keys(),
        **groups.keys(dim, width),
    )
    return grad_eXX


def _gather_sum(y_RD: Tensor, weight_CK: Tensor | None, groups: Groups) -> Tensor:
    """[R, D] to [C, D]; without weights each row counts once."""
    row_CK = groups.rows.row_TK
    (num_copies, top_k), (num_rows, dim) = row_CK.shape, y_RD.shape
    out_CD = y_RD.new_empty(num_copies, dim)
    triton_kernels.gather_sum[(num_copies, triton.cdiv(dim, SUM_DIM))](
        y_RD,
        weight_CK,
        row_CK,
        out_CD,
        num_rows=num_rows,
        WEIGHTED=weight_CK is not None,
        TOP_K=top_k,
        DIM=dim,
        BLOCK_K=min(SUM_ROWS, triton.next_power_of_2(top_k)),
        BLOCK_D=min(SUM_DIM, triton.next_power_of_2(dim)),
    )
    return out_CD
