"""Whether all ranks see one run root, as checkpoints need it, and whether what will be saved fits on it."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moetrain.checkpoint.files import sync_folder
from moetrain.config import Config
from moetrain.parallel.collectives import broadcast_text
from moetrain.parallel.mesh import Mesh
from moetrain.preflight.findings import INSTEAD, Finding, Raised, ask, judged, ranks

GIB = 2**30
PATIENCE_S = 10.0
"""Network file systems show what others have written when their caches have aged."""
NUM_READ = 16
OTHER_FILES = 64
"""Inodes that a run takes beside its checkpoints."""
TOGETHER = "put run.root on storage that all hosts share"


@dataclass(frozen=True)
class Seen:
    """Ranks whose files this one does not see, or sees with another content."""

    missing: list[int]
    wrong: list[int]


@dataclass(frozen=True)
class Room:
    """Free for this user. inodes: None where the file system does not count them."""

    bytes: int
    inodes: int | None


@dataclass(frozen=True)
class Nothing:
    pass


def check_shared(root: Path, mesh: Mesh) -> Finding:
    """Every rank writes a file into a new folder below ``root`` the way checkpoints are written; the folder is renamed;
    everyone looks for all files and reads some. Collective.
    """
    name = broadcast_text(f".preflight-{uuid.uuid4().hex[:12]}", mesh.world_group)
    folder, renamed = root / name, root / f"{name}-renamed"
    value, check = str(root), "run.root"
    try:
        ask(lambda: _write(folder, mesh.rank), Nothing, mesh)
        for path in (folder, renamed):
            if path is renamed:
                ask(lambda: _rename(folder, renamed, mesh.is_main), Nothing, mesh)
            seen = ask(lambda path=path: _look(path, mesh.rank, mesh.world_size), Seen, mesh)  # type: ignore[misc]
            if (finding := judge_seen(seen, value, renamed=path is renamed)) is not None:
                return finding
    except Raised as error:
        return Finding(check, False, f"it can not be used: {error}", INSTEAD, value)
    finally:
        for path in (folder, renamed):
            shutil.rmtree(path, ignore_errors=True)
    return Finding(check, True, f"{root}: seen, written and renamed by all", value=value)


def judge_seen(seen: Sequence[Seen], value: str, *, renamed: bool) -> Finding | None:
    """What is wrong, if anything."""
    blind = [rank for rank, one in enumerate(seen) if one.missing]
    if blind:
        by = sorted({other for one in seen for other in one.missing})
        after = " once their folder was renamed" if renamed else ""
        reason = f"{ranks(blind)} do not see what {ranks(by)} have just written{after}"
        return Finding("run.root", False, reason, TOGETHER, value)
    odd = [rank for rank, one in enumerate(seen) if one.wrong]
    if odd:
        reason = f"{ranks(odd)} read something else than was written to it"
        return Finding("run.root", False, reason, TOGETHER, value)
    return None


def check_room(config: Config, root: Path, parameters: int, held_bytes: int, mesh: Mesh) -> Finding:
    """parameters: of the whole model. held_bytes: of checkpoints that this run has already. Collective."""
    each = checkpoint_bytes(config, parameters)
    number = num_checkpoints(config)
    needed = max(number * each - held_bytes, 0)
    inodes = number * (mesh.world_size + 2) + OTHER_FILES
    return judged("disk", lambda: _room(root), Room, lambda rooms: judge_room(rooms, needed, inodes, number), mesh)


def judge_room(rooms: Sequence[Room], needed: int, inodes: int, number: int) -> Finding:
    free = min(room.bytes for room in rooms)
    counted = [room.inodes for room in rooms if room.inodes is not None]
    said = f"{free / GIB:.2f} GiB free, {number} checkpoints at once need {needed / GIB:.2f} GiB"
    fix = "free some, choose another run.root, or lower train.keep_checkpoints"
    if free < needed:
        return Finding("disk", False, said, fix, f"{free / GIB:.2f} GiB")
    if counted and min(counted) < inodes:
        reason = f"{min(counted):,} inodes are free, the run needs up to {inodes:,}"
        return Finding("disk", False, reason, fix, f"{min(counted)} inodes")
    return Finding("disk", True, said)


def checkpoint_bytes(config: Config, parameters: int) -> int:
    """fp32 weights and moments of ``parameters``."""
    return parameters * (4 + {"adamw": 8, "sgd": 0}[config.optim.name])


def num_checkpoints(config: Config) -> int:
    """The most that lie there at once: those that stay, and one that is being written."""
    train = config.train
    if not train.checkpoint_every:
        return 0
    saved = -(-train.steps // train.checkpoint_every)
    kept = train.keep_checkpoints + train.keep_best + (train.steps // train.keep_every if train.keep_every else 0)
    return min(saved, kept + 1)


def size_of(folder: Path) -> int:
    """Bytes of all files below it, 0 if it is not there."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _name(rank: int) -> str:
    return f"rank_{rank:05d}"


def _content(folder: Path, rank: int) -> bytes:
    return f"{folder.name.removesuffix('-renamed')} of rank {rank}\n".encode()


def _write(folder: Path, rank: int) -> Nothing:
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f"{_name(rank)}.new"
    with fresh.open("wb") as file:
        file.write(_content(folder, rank))
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(folder / _name(rank))
    sync_folder(folder)
    return Nothing()


def _rename(folder: Path, renamed: Path, is_main: bool) -> Nothing:
    if is_main:
        folder.rename(renamed)
        sync_folder(folder.parent)
    return Nothing()


def _look(folder: Path, rank: int, world_size: int) -> Seen:
    """All names; contents of the next rank's file and of some spread over the world."""
    names = {_name(one): one for one in range(world_size)}
    missing = _wait(lambda: sorted(names[name] for name in names.keys() - _listed(folder)))
    stride = max(world_size // NUM_READ, 1)
    some = {(rank + step) % world_size for step in (1, *range(0, world_size, stride))} - set(missing)
    wrong = [one for one in sorted(some) if (folder / _name(one)).read_bytes() != _content(folder, one)]
    return Seen(missing, wrong)


def _listed(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _wait(look: Callable[[], list[int]]) -> list[int]:
    """Look again until nothing is missing, for a while."""
    deadline = time.monotonic() + PATIENCE_S
    while (missing := look()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return missing


def _room(root: Path) -> Room:
    root.mkdir(parents=True, exist_ok=True)
    found = os.statvfs(root)
    return Room(found.f_bavail * found.f_frsize, found.f_favail if found.f_files else None)
