"""Collectives that autograd follows, and reductions of plain numbers. A group of None means one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class _AllToAll(torch.autograd.Function):
    """Rows to their ranks; in backward their gradients travel the same way back."""

    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, send: list[int] | None, receive: list[int] | None, group: ProcessGroup
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchange(x_RD, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grads[0], ctx.receive, ctx.send, ctx.group), None, None, None


def _exchange(x_RD: Tensor, send: list[int] | None, receive: list[int] | None, group: ProcessGroup) -> Tensor:
    num_rows = x_RD.shape[0] if receive is None else sum(receive)
    out_RD = x_RD.new_empty(num_rows, *x_RD.shape[1:])
    dist.all_to_all_single(out_RD, x_RD.contiguous(), receive, send, group=group)
    return out_RD


def all_to_all_rows(
    x_RD: Tensor, send: list[int] | None, receive: list[int] | None, group: ProcessGroup | None
) -> Tensor:
    """Send row blocks ``send[r]`` of x_RD to rank r of the group, receive ``receive[r]`` rows from it; None = equal
    blocks.

    Differentiable. Every rank of the group takes part in forward and in backward, also with zero rows.
    """
    if group is None:
        return x_RD
    out: Tensor = _AllToAll.apply(x_RD, send, receive, group)
    return out


def exchange_counts(counts_GE: Tensor, group: ProcessGroup | None) -> Tensor:
    """counts_GE int64 [G, e] of rows for each rank's experts -> [G, e] of rows from each rank for mine. No gradient."""
    if group is None:
        return counts_GE
    out_GE = torch.empty_like(counts_GE)
    dist.all_to_all_single(out_GE, counts_GE.contiguous(), group=group)
    return out_GE


def gather_equal(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Stack the same-shaped tensor of every rank: [ranks, *x.shape]. No gradient."""
    if group is None:
        return x.detach().unsqueeze(0)
    out = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather(list(out.unbind(0)), x.detach().contiguous(), group=group)
    return out


def sum_over(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum over the group as a NEW tensor (the input is left alone: in-place reductions have bitten others)."""
    out = x.detach().clone()
    if group is not None:
        dist.all_reduce(out, group=group)
    return out


def barrier(group: ProcessGroup | None) -> None:
    """Wait for every rank of the group."""
    if group is not None:
        dist.barrier(group=group)


def gather_texts(text: str, group: ProcessGroup | None) -> list[str]:
    """Every rank's text, in order of rank."""
    if group is None:
        return [text]
    box: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(box, text, group=group)
    return box


def broadcast_text(text: str, group: ProcessGroup | None) -> str:
    """Rank 0's text on every rank."""
    if group is None:
        return text
    box = [text]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]
