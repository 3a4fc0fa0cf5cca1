"""One checkpoint is one folder::

    checkpoints/step_00000100/rank_00000.safetensors   what this rank holds
                              rank_00001.safetensors
                              manifest.json            layout, sizes, hashes, what is not a tensor

It is written as ``step_00000100.tmp`` and renamed when every byte is on disk: a folder without ``.tmp`` is whole,
whatever was killed when. The folder must be one that all ranks see.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moetrain.parallel.collectives import broadcast_text, gather_equal
from moetrain.parallel.mesh import Mesh

FORMAT = 1
MANIFEST = "manifest.json"
WHOLE = re.compile(r"step_\d{8,}")
DIGEST_BYTES = 32


@dataclass(frozen=True)
class Checkpoint:
    """What one rank gets back: its own tensors (on the CPU), and ``extra`` as rank 0 saved it."""

    step: int
    tensors: dict[str, Tensor]
    extra: dict[str, Any]


def save(
    folder: Path, step: int, tensors: Mapping[str, Tensor], extra: Mapping[str, Any], mesh: Mesh, keep: int
) -> Path:
    """Write a checkpoint of ``step``; then drop old ones but the newest ``keep``. Collective; returns the new folder.

    tensors: this rank's. extra: JSON-able, rank 0's is kept. Raises OSError on every rank if any rank could not write.
    """
    path = folder / f"step_{step:08d}"
    unfinished = path.with_name(path.name + ".tmp")
    json.dumps(extra, allow_nan=False)  # what is not JSON-able is refused before anything is written
    _on_main(lambda: _start(unfinished), mesh)
    error, written = None, torch.zeros(1 + DIGEST_BYTES, dtype=torch.int64)
    try:
        written = _write_tensors(unfinished / _file_of(mesh.rank), tensors)
    except (OSError, SafetensorError) as caught:
        error = caught
    written_RX = gather_equal(written.to(mesh.device), mesh.world_group).cpu()
    if failed := [rank for rank, row in enumerate(written_RX.tolist()) if row[0] == 0]:
        raise OSError(f"checkpoint {unfinished} could not be written by ranks {failed}: {error}") from error
    _on_main(lambda: _finish(unfinished, path, _manifest(step, written_RX, extra, mesh), keep), mesh)
    return path


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint in ``folder``, as this process sees it."""
    found = _whole(folder)
    return found[-1] if found else None


def agree(folder: Path, mesh: Mesh) -> Path | None:
    """The newest whole checkpoint as rank 0 sees it, on every rank. Collective."""
    newest = latest(folder) if mesh.is_main else None
    name = broadcast_text("" if newest is None else newest.name, mesh.world_group)
    return folder / name if name else None


def load(path: Path, mesh: Mesh) -> Checkpoint:
    """This rank's part of the checkpoint, verified. Collective.

    Raises ValueError, on every rank, if it was saved at another world size or EP size, or if a file is missing or not
    the one that was written.
    """
    error, checkpoint = None, None
    try:
        checkpoint = _read(path, mesh)
    except (ValueError, KeyError, OSError, SafetensorError) as caught:
        error = caught
    ok = torch.tensor([checkpoint is not None], dtype=torch.int64, device=mesh.device)
    failed = [rank for rank, row in enumerate(gather_equal(ok, mesh.world_group).tolist()) if not row[0]]
    if failed or checkpoint is None:
        raise ValueError(
            f"checkpoint {path} cannot be loaded by ranks {failed}: {error or 'see their errors'}"
        ) from error
    return checkpoint


def _read(path: Path, mesh: Mesh) -> Checkpoint:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path / MANIFEST} is damaged: {error}") from error
    if manifest["format"] != FORMAT:
        raise ValueError(f"its format is {manifest['format']}, this moetrain reads {FORMAT}")
    for field, mine in (("world_size", mesh.world_size), ("ep_size", mesh.ep_size)):
        if manifest[field] != mine:
            raise ValueError(f"it was saved at {field} {manifest[field]}, this run has {field} {mine}")
    file = path / _file_of(mesh.rank)
    said = manifest["files"][file.name]
    size, digest = file.stat().st_size, _digest(file)
    if (size, digest.hex()) != (said["bytes"], said["blake2b"]):
        what = "its checksum differs" if size == said["bytes"] else f"{size} bytes where {said['bytes']} were written"
        raise ValueError(f"{file} is damaged: {what}")
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}  # not a map of a file that may go
    return Checkpoint(manifest["step"], tensors, manifest["extra"])


def _write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> Tensor:
    """Copies, because views of one storage (ZeRO's partitions) are refused by the format. Returns [size, *digest]."""
    copies = {
        name: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name, t in tensors.items()
    }
    save_file(copies, file)
    _sync(file)
    return torch.tensor([file.stat().st_size, *_digest(file)], dtype=torch.int64)


def _manifest(step: int, written_RX: Tensor, extra: Mapping[str, Any], mesh: Mesh) -> str:
    files = {
        _file_of(rank): {"bytes": row[0], "blake2b": bytes(row[1:]).hex()}
        for rank, row in enumerate(written_RX.tolist())
    }
    layout = {"world_size": mesh.world_size, "ep_size": mesh.ep_size}
    return json.dumps({"format": FORMAT, "step": step, **layout, "files": files, "extra": dict(extra)}, indent=1)


def _start(unfinished: Path) -> None:
    _remove_unfinished(unfinished.parent)
    unfinished.mkdir(parents=True)


def _finish(unfinished: Path, path: Path, manifest: str, keep: int) -> None:
    """The rename is the one moment at which the checkpoint comes into being; one of the same step makes way for it."""
    (unfinished / MANIFEST).write_text(manifest, encoding="utf-8")
    _sync(unfinished / MANIFEST)
    _sync(unfinished)
    if path.exists():
        path.rename(path.with_name(path.name + ".old.tmp"))
    unfinished.rename(path)
    _sync(path.parent)
    _remove_unfinished(path.parent)
    for old in _whole(path.parent)[:-keep]:
        shutil.rmtree(old)


def _on_main(act: Callable[[], None], mesh: Mesh) -> None:
    """Do it on rank 0 while the others wait; if it fails there, OSError on every rank."""
    failure = ""
    if mesh.is_main:
        try:
            act()
        except OSError as error:
            failure = str(error)
    if failure := broadcast_text(failure, mesh.world_group):
        raise OSError(f"rank 0 could not write the checkpoint: {failure}")


def _remove_unfinished(folder: Path) -> None:
    for leftover in folder.glob("step_*.tmp"):
        shutil.rmtree(leftover)


def _whole(folder: Path) -> list[Path]:
    """Oldest first."""
    found = [p for p in folder.glob("step_*") if WHOLE.fullmatch(p.name) and (p / MANIFEST).is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def _file_of(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _digest(file: Path) -> bytes:
    content = hashlib.blake2b(digest_size=DIGEST_BYTES)
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            content.update(block)
    return content.digest()


def _sync(path: Path) -> None:
    """Have a file or a folder on disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
