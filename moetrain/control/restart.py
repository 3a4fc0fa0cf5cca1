"""An expert made anew from another one: its weights, its rows of the router, and what the optimiser remembers of them.

It works on the canonical state, which does not know of layouts: whichever ranks hold the pieces of either expert, in
whatever precision the model computes, the outcome is a function of the source's weights and the noise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from moetrain.canonical import Piece, State
from moetrain.checks import traits_of
from moetrain.engine import Engine
from moetrain.models.decoder import Decoder
from moetrain.ops.init import Draw
from moetrain.parallel.collectives import sum_over
from moetrain.parallel.mesh import Mesh


@dataclass(frozen=True)
class Restart:
    """``expert`` of the MoE layer number ``layer`` (from 0, dense ones not counted) becomes a copy of ``source``."""

    layer: int
    expert: int
    source: int


@dataclass(frozen=True)
class Rows:
    """``size`` values of a canonical tensor from ``start`` on: all of an expert's, or its row of a router's."""

    key: str
    start: int
    size: int


def restart(engine: Engine, model: Decoder, mesh: Mesh, restarts: Sequence[Restart], draw: Draw, noise: float) -> None:
    """Weights: the source's, plus N(0, noise * their root mean square) from ``draw``; copied as they are where an
    expert has a single number, as are buffers. The optimiser's moments: zero; its count of steps is shared, and stays.

    Call it between steps. Collective.
    """
    paths, rows = model.moe_paths(), traits_of(model.config).per_expert

    def edit(state: State) -> None:
        editor = _Editor(state, mesh)
        for one in restarts:
            path = paths[one.layer]
            for to, source in [*_of_experts(state, path, one), *_of_router(state, path, rows, one)]:
                values_X = editor.read(source)
                if to.key.startswith("weight/") and to.size > 1:
                    scale = noise * values_X.double().square().mean().sqrt().float()
                    drawn_X = torch.empty(to.size).normal_(generator=draw.generator(f"{to.key}[{one.expert}]"))
                    values_X = values_X + scale * drawn_X.to(values_X.device)
                editor.write(to, values_X)
                editor.forget(to)

    engine.load_state(edit)


def _of_experts(state: State, path: str, one: Restart) -> list[tuple[Rows, Rows]]:
    """(to, from) of the expert's own tensors."""
    ending = f"/{one.source:05d}"
    names = [key.removesuffix(ending) for key in state.tensors if key.endswith(ending)]
    found = []
    for name in names:
        if name.startswith(f"weight/{path}.experts."):
            size = state.tensors[name + ending].num_values
            found.append((Rows(f"{name}/{one.expert:05d}", 0, size), Rows(name + ending, 0, size)))
    return found


def _of_router(state: State, path: str, names: Iterable[str], one: Restart) -> list[tuple[Rows, Rows]]:
    """(to, from) of the expert's rows in what the router keeps; settings leave some of it out."""
    keys = [f"{kind}/{path}.router.{name}" for name in names for kind in ("weight", "buffer")]
    found = []
    for key in keys:
        if key in state.tensors:
            size = prod(state.tensors[key].shape[1:])
            found.append((Rows(key, one.expert * size, size), Rows(key, one.source * size, size)))
    return found


class _Editor:
    """Reads and writes canonical tensors that lie in pieces on all ranks."""

    def __init__(self, state: State, mesh: Mesh) -> None:
        self._mesh = mesh
        self._held: defaultdict[str, list[Piece]] = defaultdict(list)
        self._shares: defaultdict[str, list[Piece]] = defaultdict(list)
        for pieces, index in ((state.held, self._held), (state.shares, self._shares)):
            for piece in pieces:
                index[piece.key].append(piece)

    def read(self, rows: Rows) -> Tensor:
        """On every rank, by one all-reduce to which every element comes from one rank alone, so it is exact."""
        values_X = torch.zeros(rows.size, device=self._mesh.device)
        for piece in self._shares[rows.key]:
            here, there = _overlap(piece, rows)
            values_X[there] = piece.values_X[here]
        return sum_over(values_X, self._mesh.world_group)

    def write(self, rows: Rows, values_X: Tensor) -> None:
        """What of it this rank holds."""
        for piece in self._held[rows.key]:
            here, there = _overlap(piece, rows)
            piece.values_X[here] = values_X[there]

    def forget(self, rows: Rows) -> None:
        """Zero the optimiser's moments of a parameter."""
        name = rows.key.removeprefix("weight/")
        for key in [key for key in self._held if key.startswith("optimizer/") and key.endswith(f"/{name}")]:
            self.write(Rows(key, rows.start, rows.size), torch.zeros(rows.size, device=self._mesh.device))


def _overlap(piece: Piece, rows: Rows) -> tuple[slice, slice]:
    """The elements that both have, as slices of either; empty ones where there are none."""
    begin = max(piece.start, rows.start)
    end = max(begin, min(piece.start + piece.values_X.numel(), rows.start + rows.size))
    return slice(begin - piece.start, end - piece.start), slice(begin - rows.start, end - rows.start)
