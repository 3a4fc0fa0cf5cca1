"""Inside DeepSpeed 0.19.8's ZeRO, stage by stage: where this rank's fp32 weights lie, how the model's weights follow
them, and who decides whether a step is taken.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


class Judge:
    """Stands in for DeepSpeed's test of a gradient norm: ``accepts`` is asked once, ``norm`` is what it was asked."""

    def __init__(self, accepts: Callable[[float], bool]) -> None:
        self._accepts, self._refused = accepts, False
        self.norm = math.nan

    def refuses(self, norm: Tensor | float) -> bool:
        """DeepSpeed asks of the global norm, before clipping (-1: not finite), and again where it clips by it."""
        if math.isnan(self.norm):
            self.norm = float(norm) if norm >= 0 else math.inf
            self._refused = not self._accepts(self.norm)
        return self._refused


@contextmanager
def judged(optimizer: Any, accepts: Callable[[float], bool]) -> Iterator[Judge]:
    """Within, the optimiser's step is taken or skipped as ``accepts`` says of the norm that DeepSpeed has computed.

    What is refused goes the way of an overflow: no weight, moment or step count moves, all gradients are dropped. All
    three classes ask ``is_invalid_grad_norm`` of their module. Before that ZeRO 1 and 2 look through the gradients for
    an overflow, upon which they would compute no norm: it tells the same, for it is not finite where a gradient is not.
    A loss scale there is none, only a false word about it in the log.
    """
    module: Any = sys.modules[type(optimizer).__module__]
    judge = Judge(accepts)
    test = module.is_invalid_grad_norm
    module.is_invalid_grad_norm = judge.refuses
    optimizer.check_overflow = optimizer._update_scale = _nothing
    try:
        yield judge
    finally:
        module.is_invalid_grad_norm = test
    assert not math.isnan(judge.norm), f"{type(optimizer).__name__} has taken a step without a look at its norm"


def _nothing(*_: object, **__: object) -> None:
    """In place of a method that is not needed."""
