"""Tokens to expert rows and back: one gather out, one weighted sum home, each the other's backward.

The two sides of a ``RowMap`` are inverse to each other, so no backward needs an atomic scatter-add: both directions are
gathers in a fixed order, hence deterministic. Time and memory are O(R D) and a few numbers per assignment, also where
most assignments have no row (a ragged routing has K = E).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moetrain.types import RowMap


def rows_of_tokens(x_TD: Tensor, rows: RowMap) -> Tensor:
    """[T, D] -> [R, D]: each row its token, empty rows zero."""
    out: Tensor = _Spread.apply(x_TD, rows)
    return out


def tokens_of_rows(y_RD: Tensor, weight_TK: Tensor | None, rows: RowMap) -> Tensor:
    """[R, D] -> [T, D]: each token the weighted sum of its rows, the plain sum without weights; dropped assignments add
    nothing.

    weight_TK is fp32 and so is the sum, whatever y's dtype; the result has y's dtype.
    """
    out: Tensor = _Sum.apply(y_RD, rows) if weight_TK is None else _Gather.apply(y_RD, weight_TK, rows)
    return out


def rows_of_tokens_plain(x_TD: Tensor, rows: RowMap) -> Tensor:
    """The reference of ``rows_of_tokens``, left to autograd."""
    return torch.cat([x_TD, x_TD.new_zeros(1, x_TD.shape[1])])[rows.token_R]


def tokens_of_rows_plain(y_RD: Tensor, weight_TK: Tensor, rows: RowMap) -> Tensor:
    """The reference of ``tokens_of_rows``, left to autograd."""
    padded = torch.cat([y_RD, y_RD.new_zeros(1, y_RD.shape[1])])[rows.row_TK]
    return (padded.float() * weight_TK.unsqueeze(-1)).sum(1).to(y_RD.dtype)


def take_rows(x_TD: Tensor, rows: RowMap) -> Tensor:
    """``rows_of_tokens`` outside of autograd."""
    source = torch.cat([x_TD, x_TD.new_zeros(1, x_TD.shape[1])]) if rows.has_empty else x_TD
    return source.index_select(0, rows.token_R)


def weights_of_rows(weight_TK: Tensor, rows: RowMap) -> Tensor:
    """The weight of each row, [R]; of an empty one 0."""
    weight_N = weight_TK.reshape(-1)
    return torch.cat([weight_N, weight_N.new_zeros(1)])[rows.assignment_R]


def of_assignments(value_R: Tensor, rows: RowMap) -> Tensor:
    """Each assignment's entry of ``value_R``, [T, K]; 0 where it has no row."""
    return torch.cat([value_R, value_R.new_zeros(1)])[rows.row_TK]


def plain_sum(y_RD: Tensor, rows: RowMap) -> Tensor:
    """``tokens_of_rows`` without weights, outside of autograd."""
    ones_TK = torch.ones(rows.row_TK.shape, dtype=y_RD.dtype, device=y_RD.device)
    return _sums(y_RD, ones_TK, rows)


def weighted_sum(y_RD: Tensor, weight_TK: Tensor, rows: RowMap) -> Tensor:
    """``tokens_of_rows`` outside of autograd. A bag adds up in fp32, but its weights have the dtype of its rows."""
    return _sums(y_RD.float(), weight_TK.float(), rows).to(y_RD.dtype)


def _sums(y_RD: Tensor, weight_TK: Tensor, rows: RowMap) -> Tensor:
    (num_rows, dim), row_TK = y_RD.shape, rows.row_TK
    if num_rows == 0:
        return y_RD.new_zeros(row_TK.shape[0], dim)
    if rows.is_sparse:
        return _sums_of_few(y_RD, weight_TK, rows)
    weight_TK = weight_TK.masked_fill(row_TK >= num_rows, 0.0)
    row_TK = row_TK.clamp(max=num_rows - 1)
    return torch.nn.functional.embedding_bag(row_TK, y_RD, mode="sum", per_sample_weights=weight_TK)


def _sums_of_few(y_RD: Tensor, weight_TK: Tensor, rows: RowMap) -> Tensor:
    """Rows in order of their assignments, each token's by its choices; a bag after the last token takes empty rows."""
    num_rows = y_RD.shape[0]
    assignment_R, order_R = rows.assignment_R.sort(stable=True)
    weight_R = torch.cat([weight_TK.reshape(-1), weight_TK.new_zeros(1)])[assignment_R]
    ends_T = (rows.row_TK < num_rows).sum(1).cumsum(0)
    offsets = torch.cat([ends_T.new_zeros(1), ends_T, ends_T.new_full((1,), num_rows)])
    bags = torch.nn.functional.embedding_bag(
        order_R, y_RD, offsets, mode="sum", per_sample_weights=weight_R, include_last_offset=True
    )
    return bags[:-1].clone()  # autograd forbids changing in place what a Function returns as a view


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, rows: RowMap) -> Tensor:
        ctx.rows = rows
        return take_rows(x_TD, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return plain_sum(grads[0], ctx.rows), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, rows: RowMap) -> Tensor:
        ctx.rows = rows
        return plain_sum(y_RD, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return take_rows(grads[0], ctx.rows), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weight_TK: Tensor, rows: RowMap) -> Tensor:
        ctx.save_for_backward(y_RD, weight_TK)
        ctx.rows = rows
        return weighted_sum(y_RD, weight_TK, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        y_RD, weight_TK = ctx.saved_tensors
        rows: RowMap = ctx.rows
        grad_RD = take_rows(grads[0], rows)
        dot_R = torch.linalg.vecdot(grad_RD.float(), y_RD.float())
        weight_R = weights_of_rows(weight_TK, rows)
        return (grad_RD * weight_R.unsqueeze(-1)).to(y_RD.dtype), of_assignments(dot_R, rows), None
