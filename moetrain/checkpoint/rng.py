"""Random generators of this process: torch's on the CPU, and the device's own. They belong to a rank of one layout."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from moetrain.canonical import Piece
from moetrain.checkpoint.source import GENERATORS

CPU, DEVICE = "cpu", "device"


def generators(rank: int, device: torch.device) -> list[Piece]:
    """Their states, uint8, to be saved beside the model's tensors."""
    states = {CPU: torch.get_rng_state()}
    if device.type != "cpu":
        states[DEVICE] = torch.get_device_module(device).get_rng_state(device)
    return [Piece(f"{GENERATORS}{rank:05d}/{name}", 0, state) for name, state in states.items()]


def set_generators(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what ``generators`` gave on this kind of device, by the last part of its names."""
    torch.set_rng_state(states[CPU])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[DEVICE], device)


def seed_generators(seed: int, step: int, rank: int) -> None:
    """Start all of them anew, as a function of where the run is."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
