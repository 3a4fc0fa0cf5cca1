"""One linear map per expert over rows that lie grouped by expert."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_linear(x_RI: Tensor, weight_eOI: Tensor, ends_e: Tensor, rows_per_expert: int | None) -> Tensor:
    """[R, I] x [e, O, I] -> [R, O]: rows up to ``ends_e[i]`` meet expert i's weight.

    ends_e: int32, cumulative, last one R. Where all experts have ``rows_per_expert`` rows, one batched product does it
    and ``ends_e`` is not read. Zero rows give an empty result and zero (not None) gradients for every expert.
    """
    if rows_per_expert is None:
        return torch.nn.functional.grouped_mm(x_RI, weight_eOI.transpose(1, 2), offs=ends_e)
    num_experts, _, dim_in = weight_eOI.shape
    x_eRI = x_RI.view(num_experts, rows_per_expert, dim_in)
    return torch.bmm(x_eRI, weight_eOI.transpose(1, 2)).flatten(0, 1)


def add_grouped(x_RO: Tensor, bias_eO: Tensor, ends_e: Tensor, rows_per_expert: int | None) -> Tensor:
    """[R, O] + [e, O] -> [R, O]: each row plus the vector of its expert; no host read.

    The backward is a product too, which sums the gradients of an expert's rows without atomics, in fp32 inside. Zero
    rows give zero (not None) gradients.
    """
    num_experts, dim_out = bias_eO.shape
    if rows_per_expert is not None:
        return (x_RO.view(num_experts, rows_per_expert, dim_out) + bias_eO.unsqueeze(1)).flatten(0, 1)
    row_R = torch.arange(x_RO.shape[0], device=x_RO.device, dtype=ends_e.dtype)
    expert_R = torch.searchsorted(ends_e, row_R, right=True)
    is_of_Re = expert_R.unsqueeze(1) == torch.arange(num_experts, device=x_RO.device)
    return x_RO + is_of_Re.to(bias_eO.dtype) @ bias_eO


def grouped_outer(grad_RO: Tensor, x_RI: Tensor, ends_e: Tensor, rows_per_expert: int | None) -> Tensor:
    """[R, O] x [R, I] -> [e, O, I], the gradient of the weights of ``grouped_linear``: sums over an expert's rows, zero
    where it has none.
    """
    if rows_per_expert is None:
        return torch.nn.functional.grouped_mm(grad_RO.t(), x_RI, offs=ends_e)
    grad_eRO, x_eRI = (y_RX.view(ends_e.shape[0], rows_per_expert, y_RX.shape[1]) for y_RX in (grad_RO, x_RI))
    return torch.bmm(grad_eRO.transpose(1, 2), x_eRI)
