"""Random generators of this process as tensors: torch's on the CPU, and the device's own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

CPU, DEVICE = "rng.cpu", "rng.device"


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """uint8 states, to be saved among a rank's tensors."""
    state = {CPU: torch.get_rng_state()}
    if device.type != "cpu":
        state[DEVICE] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what ``rng_state`` gave; other tensors in ``state`` are left alone.

    Raises ValueError if the device's generator was not saved (the checkpoint comes from another kind of device).
    """
    torch.set_rng_state(state[CPU].cpu())
    if device.type == "cpu":
        return
    if DEVICE not in state:
        raise ValueError(f"the checkpoint has no generator state of a {device.type} device: it was saved on a CPU")
    torch.get_device_module(device).set_rng_state(state[DEVICE].cpu(), device)
