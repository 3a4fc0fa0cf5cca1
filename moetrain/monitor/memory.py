"""Memory of every rank: the peak is measured, the parts are computed from what the engine holds."""

from __future__ import annotations

import resource
from typing import Protocol

import torch
from torch import nn

from moetrain.canonical import State
from moetrain.monitor.report import RankMemory
from moetrain.parallel.collectives import gather_equal
from moetrain.parallel.mesh import Mesh


class HoldsState(Protocol):
    """What is asked of an engine here."""

    model: nn.Module

    def state(self) -> State: ...


def peak_bytes(device: torch.device) -> int:
    """The most that was in use at once: of the accelerator's memory, or of this process on a CPU."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(torch.accelerator.max_memory_allocated(device))


def measure_memory(engine: HoldsState, mesh: Mesh) -> tuple[RankMemory, ...]:
    """Of all ranks, in order of rank. Collective.

    weights: of the model as it lies in memory (under ZeRO 3, where it is empty between steps, this rank's share);
    masters that are not the weights' own memory and the optimiser's moments are ``optimizer``; gradients: one fp32
    value for each value of ``weight/*`` in the state.
    """
    held = engine.state().held
    masters = sum(piece.values_X.nbytes for piece in held if piece.key.startswith("weight/"))
    value = next(engine.model.parameters()).element_size()
    weights = max(sum(p.numel() for p in engine.model.parameters()) * value, masters // 4 * value)
    moments = sum(piece.values_X.nbytes for piece in held if piece.key.startswith("optimizer/"))
    own = {p.untyped_storage().data_ptr() for p in engine.model.parameters()}
    pieces = [piece.values_X for piece in held if piece.key.startswith("weight/")]
    apart = sum(values.nbytes for values in pieces if values.untyped_storage().data_ptr() not in own)
    row = torch.tensor([weights, masters, moments + apart, peak_bytes(mesh.device)], device=mesh.device)
    rows = gather_equal(row, mesh.world_group).tolist()
    return tuple(RankMemory(rank, *numbers) for rank, numbers in enumerate(rows))
