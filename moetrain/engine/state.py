"""Weights, optimiser state and buffers of an engine as one flat dict of tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer


def pack(masters: Mapping[str, Tensor], optimizer: Optimizer, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``weight.<name>``: fp32 masters; ``optimizer.<key>.<name>``: what the optimiser keeps; ``buffer.<name>``."""
    state = {f"weight.{name}": master.detach() for name, master in masters.items()}
    for name, master in masters.items():
        kept = optimizer.state.get(master, {})
        state |= {f"optimizer.{key}.{name}": value for key, value in kept.items() if isinstance(value, Tensor)}
    return state | {f"buffer.{name}": buffer for name, buffer in buffers.items()}


@torch.no_grad()
def unpack(
    state: Mapping[str, Tensor], masters: Mapping[str, Tensor], optimizer: Optimizer, buffers: Mapping[str, Tensor]
) -> None:
    """Put back what ``pack`` gave. Torch makes Adam's state at its first step: here it is simply set.

    Raises ValueError naming the first tensor that is missing, left over or of another shape or dtype; then nothing has
    been changed.
    """
    targets = {f"weight.{name}": master for name, master in masters.items()}
    targets |= {f"buffer.{name}": buffer for name, buffer in buffers.items()}
    moments = {name: value for name, value in state.items() if name.startswith("optimizer.")}
    _check(state.keys() - moments.keys(), set(targets))
    for name, target in targets.items():
        if state[name].shape != target.shape or state[name].dtype != target.dtype:
            raise ValueError(
                f"state {name!r} is {state[name].dtype} {list(state[name].shape)}, this engine's is "
                f"{target.dtype} {list(target.shape)}: it was saved by another model, engine or layout"
            )
    owners = {name: name.split(".", 2)[2] for name in moments}
    _check(set(owners.values()) - masters.keys(), set())
    for name, target in targets.items():
        target.copy_(state[name])
    for master in masters.values():
        optimizer.state.pop(master, None)
    for name, value in moments.items():
        master = masters[owners[name]]
        optimizer.state[master][name.split(".", 2)[1]] = value.to(master.device, copy=True)


def _check(got: set[str], wanted: set[str]) -> None:
    if odd := sorted(got ^ wanted):
        where = "is not in the saved state" if odd[0] in wanted else "has no place in this engine"
        raise ValueError(f"state {odd[0]!r} {where}: it was saved by another model, engine or layout")
