"""Where DeepSpeed 0.19.8 keeps this rank's fp32 weights, stage by stage, and how the model's weights follow them."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from moetrain.canonical import Stretch


def stretches(optimizer: Any, model: nn.Module) -> list[Stretch]:
    """What ZeRO has left this rank of the parameters of ``model``, in its flat fp32 partitions.

    ZeRO 1 and 2 cut all parameters of a group as one flat tensor, so that a rank has all of one, a part, or nothing.
    ZeRO 3 cuts each parameter by itself; the last rank's part may end in padding, or be nothing but that.
    """
    partitions, found = _partitions(optimizer), []
    for name, param in model.named_parameters():
        if hasattr(optimizer, "grad_position"):
            group, at, size = optimizer.grad_position[optimizer.get_param_id(param)]
            start = size * dist.get_rank(param.ds_process_group)
            size = min(size, max(0, param.ds_numel - start))
        elif (fragment := param._hp_mapping) is not None:
            group, at = fragment.param_group_index, fragment.hp_fragment_address.start
            start, size = fragment.lp_fragment_address.start, fragment.lp_fragment_address.numel
        else:
            continue
        found.append(Stretch(name, start, size, partitions[group], at))
    return found


def _partitions(optimizer: Any) -> list[Tensor]:
    """In DeepSpeed's order. ZeRO 1 and 2 keep one a parameter group; ZeRO 1 in bf16 is another class with another name
    for the same thing; ZeRO 3 cuts groups into sub-groups.
    """
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, attribute):
            return list(getattr(optimizer, attribute))
    raise AssertionError(f"{type(optimizer).__name__} has no fp32 partitions that moetrain knows")


def inner(optimizer: Any) -> Optimizer:
    """The torch optimiser that DeepSpeed wraps."""
    wrapped: Optimizer = optimizer.optimizer
    return wrapped


def refresh(optimizer: Any) -> None:
    """Bring the model's weights in line with the fp32 partitions, on every rank (collective)."""
    if hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
        return
    optimizer._partition_all_parameters()
    for index in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(index)
    optimizer._post_step(set())
