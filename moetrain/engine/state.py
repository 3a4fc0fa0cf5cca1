"""An engine's masters, moments and buffers as canonical tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moetrain.canonical import STEP, Names, Piece, Spec, State, Stretch, buffer_specs, persistent_buffers
from moetrain.config import OptimConfig
from moetrain.parallel.mesh import Mesh

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}


class CanonicalState:
    """Made before the engine touches the model; ``of`` gives the state at any time after."""

    def __init__(self, model: nn.Module, mesh: Mesh, optim: OptimConfig) -> None:
        self._model, self._mesh = model, mesh
        self._names, self._moments = Names(model, mesh), MOMENTS[optim.name]

    def of(self, held: list[Stretch], shares: list[Stretch], optimizer: Optimizer) -> State:
        """held, shares: what this rank holds, and what of it this rank writes, in the masters of ``optimizer``."""
        buffers = persistent_buffers(self._model)
        places = [Piece(f"buffer/{name}", 0, b.view(-1)) for name, b in buffers.items()]
        written = [p for i, p in enumerate(places) if i % self._mesh.world_size == self._mesh.rank]
        masters = list({id(s.master): s.master for s in held}.values())
        steps = [Piece(STEP, 0, self._kept(m, optimizer)["step"].view(1)) for m in masters] if self._moments else []
        if self._mesh.is_main:
            written += steps[:1]
        return State(
            self._tensors(buffer_specs(buffers)),
            [*self._pieces(held, optimizer), *places, *steps],
            [*self._pieces(shares, optimizer), *written],
        )

    def _tensors(self, buffers: dict[str, Spec]) -> dict[str, Spec]:
        kinds = ["weight", *(f"optimizer/{moment}" for moment in self._moments)]
        shapes = self._names.shapes()
        tensors = {f"{kind}/{name}": Spec("F32", shape) for kind in kinds for name, shape in shapes.items()}
        if self._moments:
            tensors[STEP] = Spec("F32", ())
        return tensors | buffers

    def _pieces(self, stretches: Iterable[Stretch], optimizer: Optimizer) -> list[Piece]:
        found = []
        for stretch in stretches:
            flat = {"weight": stretch.master.detach()}
            kept = self._kept(stretch.master, optimizer)
            flat |= {f"optimizer/{moment}": kept[moment] for moment in self._moments}
            for part in self._names.cut(stretch):
                for kind, values in flat.items():
                    found.append(Piece(f"{kind}/{part.name}", part.start, values[part.at : part.at + part.size]))
        return found

    def _kept(self, master: Tensor, optimizer: Optimizer) -> dict[str, Any]:
        """What the optimiser keeps for a master. Torch makes it at the first step: before that, it is what it would be
        made as.
        """
        kept: dict[str, Any] = optimizer.state[master]
        if self._moments and not kept:
            kept["step"] = torch.zeros((), device=master.device)
            kept.update((moment, torch.zeros_like(master.detach())) for moment in self._moments)
        return kept
