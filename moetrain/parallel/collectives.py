"""Reductions of plain numbers and texts. A group of None means one process. (Rows of tokens: exchange.py.)"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


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
