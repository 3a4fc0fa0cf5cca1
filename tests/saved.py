"""Small states to be saved and loaded, by one process or by ranks that each hold a stretch of every tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain.canonical import DTYPES, Piece, Spec, State
from moetrain.checkpoint import Keep, SavedBy, Saver, Source
from moetrain.parallel.mesh import Mesh

CPU = torch.device("cpu")
ONE = Mesh(0, 1, 1, CPU)


def some_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Of many dtypes and shapes, no value like another's."""
    normal = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    return {
        "weight/a": normal,
        "weight/experts/00000": normal[0] + 1,
        "weight/experts/00001": normal[1] + 1,
        "optimizer/exp_avg/a": normal + 2,
        "optimizer/step": torch.tensor(3.0 + seed),
        "buffer/half": normal.bfloat16(),
        "buffer/count": torch.tensor([2**40 + seed]),
        "buffer/flags": normal > 0,
        "buffer/empty": torch.zeros(0),
    }


def state_of(tensors: Mapping[str, Tensor], mesh: Mesh = ONE) -> State:
    """This rank holds and writes its stretch of every tensor: ends are where they fall, as ZeRO's are."""
    pieces = []
    for key, tensor in tensors.items():
        begin, end = (tensor.numel() * rank // mesh.world_size for rank in (mesh.rank, mesh.rank + 1))
        if begin < end:
            pieces.append(Piece(key, begin, tensor.view(-1)[begin:end]))
    return State({key: Spec(DTYPES[t.dtype], tuple(t.shape)) for key, t in tensors.items()}, pieces, pieces)


def saver(folder: Path, mesh: Mesh = ONE, keep: Keep | None = None, *, background: bool = False) -> Saver:
    by = SavedBy(mesh.world_size, mesh.ep_size, "local", 0, "cpu")
    return Saver(folder, mesh, by, keep or Keep(newest=2), background=background)


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], extra: Mapping[str, Any] | None = None) -> Path:
    """By one process; it must work."""
    one = saver(folder)
    one.save(step, state_of(tensors), [], extra or {})
    assert one.failure == ""
    assert one.newest is not None
    return one.newest


def loaded(source: Source | None, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of a checkpoint that was found, with the tensors of ``like``."""
    assert source is not None
    tensors = {key: torch.zeros_like(tensor) for key, tensor in like.items()}
    source.fill(state_of(tensors))
    return tensors


def opened(path: Path) -> Source:
    """Verified and opened."""
    source = Source(path)
    source.verify()
    source.open()
    return source


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
