"""Where DeepSpeed 0.19.8 keeps this rank's fp32 weights, stage by stage, and how the model's weights follow them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def masters(optimizer: Any) -> dict[str, Tensor]:
    """Flat fp32 partitions that belong to this rank, in DeepSpeed's order, by number.

    ZeRO 1 and 2 keep one a parameter group; ZeRO 1 in bf16 is another class with another name for the same thing;
    ZeRO 3 cuts groups into sub-groups.
    """
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, attribute):
            return {str(i): partition for i, partition in enumerate(getattr(optimizer, attribute))}
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
