"""One linear map per expert over rows that lie grouped by expert."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_linear(x_RI: Tensor, weight_eOI: Tensor, ends_e: Tensor, rows_per_expert: int | None) -> Tensor:
    """[R, I] x [e, O, I] -> [R, O]: rows up to ``ends_e[i]`` meet expert i's weight.

    ends_e: int32, cumulative, last one R. Where all experts have ``rows_per_expert`` rows, one batched product does it and
    ``ends_e`` is not read. Zero rows give an empty result and zero (not None) gradients for every expert.
    """
    if rows_per_expert is None:
        return torch.nn.functional.grouped_mm(x_RI, weight_eOI.transpose(1, 2), offs=ends_e)
    num_experts, dim_out, dim_in = weight_eOI.shape
    x_eRI = x_RI.view(num_experts, rows_per_expert, dim_in)
    return torch.bmm(x_eRI, weight_eOI.transpose(1, 2)).view(-1, dim_out)


def grouped_linear_plain(x_RI: Tensor, weight_eOI: Tensor, ends_e: Tensor) -> Tensor:
    """The reference: a loop over experts. (``unbind`` keeps its backward from making one full-size zero per expert.)"""
    sizes = torch.diff(ends_e, prepend=ends_e.new_zeros(1)).tolist()
    pairs = zip(x_RI.split(sizes), weight_eOI.unbind(0), strict=True)
    return torch.cat([rows @ weight_OI.t() for rows, weight_OI in pairs])
