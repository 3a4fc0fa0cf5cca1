"""A checkpoint to load from: any stretch of any tensor, whoever wrote it in whatever pieces. Nothing is unpickled."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moetrain.canonical import DTYPES, Piece, Spec, State, weight_pieces
from moetrain.checkpoint import manifest as manifests
from moetrain.checkpoint.files import read_back
from moetrain.parallel.mesh import Mesh

log = logging.getLogger(__name__)
FILE = re.compile(r"rank_\d{5,}\.safetensors")
GENERATORS = "rng/"


@dataclass(frozen=True)
class Stored:
    """Elements start ... stop - 1 of a tensor, in an open file under ``name``."""

    start: int
    stop: int
    dtype: str
    file: Any
    name: str

    def read(self, start: int, stop: int) -> Tensor:
        """Elements start ... stop - 1 of the tensor, a copy on the CPU."""
        values: Tensor = self.file.get_slice(self.name)[start - self.start : stop - self.start]
        return values


class Source:
    """A checkpoint: to be verified, then opened (every rank opens all files and reads their headers), then read from:
    every rank takes what it needs.
    """

    def __init__(self, path: Path) -> None:
        """Raises ValueError or OSError if the manifest is damaged, or a file is missing or of another size."""
        self.path, self.manifest = path, manifests.read(path)
        self.passed_over: tuple[str, ...] = ()  # newer checkpoints that can not be used, and why
        self._stored: dict[str, list[Stored]] = {}
        for name, written in self.manifest.files.items():
            if FILE.fullmatch(name) is None:
                raise ValueError(
                    f"{path / manifests.MANIFEST} names a file {name!r:.80}, which is none of a checkpoint"
                )
            if (path / name).is_symlink():
                raise ValueError(f"{path / name} is a link, and may lead out of the checkpoint")
            size = (path / name).stat().st_size
            if size != written.bytes:
                raise ValueError(f"{path / name} is damaged: {size} bytes where {written.bytes} were written")
        if foreign := {p.name for p in path.iterdir()} - self.manifest.files.keys() - {manifests.MANIFEST}:
            log.warning("%s holds what is no part of it, and is left alone: %s", path, ", ".join(sorted(foreign)))

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def extra(self) -> dict[str, Any]:
        return self.manifest.extra

    def open(self) -> None:
        """Raises ValueError or OSError if the files are not readable, or do not make up all tensors."""
        for name in self.manifest.files:
            self._index(self.path / name)
        for key, spec in self.manifest.tensors.items():
            self._check_whole(key, spec)

    def verify(self, share: slice = slice(None)) -> None:
        """Read files [share] from end to end. Raises ValueError if one is not what was written, or OSError."""
        for name in sorted(self.manifest.files)[share]:
            if read_back(self.path / name) != self.manifest.files[name]:
                raise ValueError(f"{self.path / name} is damaged: its checksum differs")

    def fill(self, state: State, *, weights_only: bool = False) -> None:
        """Write into everything that ``state`` holds. weights_only: the optimiser's tensors are there in vain.

        Raises ValueError, naming a tensor, if these are not the tensors of the checkpoint; nothing is changed then.
        """
        self._compare(state.tensors, weights_only)
        for piece in state.held:
            self._fill(piece)

    def tensor(self, key: str) -> Tensor:
        """All of one canonical tensor, on the CPU."""
        spec = self.manifest.tensors[key]
        pieces = [stored.read(stored.start, stored.stop) for stored in self._stored[key]]
        dtype = next(dtype for dtype, name in DTYPES.items() if name == spec.dtype)
        return torch.cat([torch.empty(0, dtype=dtype), *pieces]).view(spec.shape)

    def generators(self, rank: int) -> dict[str, Tensor]:
        """States of the random generators of the rank that had this number, by the names they were saved under."""
        mine = f"{GENERATORS}{rank:05d}/"
        found = {key: pieces[0] for key, pieces in self._stored.items() if key.startswith(mine)}
        return {key.removeprefix(mine): stored.read(stored.start, stored.stop) for key, stored in found.items()}

    def _index(self, file: Path) -> None:
        try:
            opened = safe_open(file, "pt")
            for name in opened.keys():  # noqa: SIM118
                key, _, start = name.rpartition("@")
                view = opened.get_slice(name)
                (size,) = view.get_shape()
                stored = Stored(int(start), int(start) + size, view.get_dtype(), opened, name)
                self._stored.setdefault(key, []).append(stored)
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{file} is damaged: {error}") from error

    def _check_whole(self, key: str, spec: Spec) -> None:
        pieces = sorted(self._stored.get(key, []), key=lambda stored: stored.start)
        self._stored[key] = pieces
        reached = 0
        for stored in pieces:
            if stored.start != reached or stored.dtype != spec.dtype:
                raise ValueError(f"{self.path} is not whole: {key!r:.120} has other values than {spec} at {reached}")
            reached = stored.stop
        if reached != spec.num_values:
            raise ValueError(f"{self.path} is not whole: {key!r:.120} has {reached} of {spec.num_values} values")

    def _compare(self, wanted: Any, weights_only: bool) -> None:
        saved = {k: v for k, v in self.manifest.tensors.items() if not (weights_only and k.startswith("optimizer/"))}
        if odd := sorted(saved.keys() ^ wanted.keys()):
            where = "has no place in this run" if odd[0] in saved else "is not in it"
            raise ValueError(
                f"{self.path} is of another model or optimiser: {odd[0]} {where} ({len(odd)} such tensors)"
            )
        for key, spec in wanted.items():
            if saved[key] != spec:
                was, now = saved[key], spec
                raise ValueError(
                    f"{self.path} is of another model: {key} is {was.dtype} {list(was.shape)} there and"
                    f" {now.dtype} {list(now.shape)} here"
                )

    def _fill(self, piece: Piece) -> None:
        first, last = piece.start, piece.start + piece.values_X.numel()
        for stored in self._stored[piece.key]:
            begin, end = max(first, stored.start), min(last, stored.stop)
            if begin < end:
                piece.values_X[begin - first : end - first].copy_(stored.read(begin, end))


def load_weights(path: Path, model: nn.Module, mesh: Mesh) -> Source:
    """Weights and buffers of a checkpoint, saved at whatever layout, into a bare model on ``mesh`` (for tools: of one
    process). All files are verified.

    Raises ValueError if the checkpoint is damaged or of another model, or OSError.
    """
    source = Source(path)
    source.verify()
    source.open()
    source.fill(weight_pieces(model, mesh), weights_only=True)
    return source
