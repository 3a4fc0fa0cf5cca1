"""Saving. One checkpoint is one folder::

    checkpoints/step_00000100/rank_00000.safetensors   the pieces that rank 0 wrote
                              rank_00001.safetensors
                              manifest.json            all tensors, all files with size and hash, what is no tensor

It is written as ``step_00000100.tmp`` and renamed when every byte is on disk: a folder without ``.tmp`` is whole,
whatever was killed when. The folder must be one that all ranks see.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch

from moetrain.canonical import Piece, State
from moetrain.checkpoint.files import Contents, Written, sync_folder, write
from moetrain.checkpoint.find import ASIDE
from moetrain.checkpoint.keep import Keep, prune, remove, remove_unfinished
from moetrain.checkpoint.manifest import MANIFEST, Manifest, SavedBy, to_text
from moetrain.parallel.collectives import broadcast_text, gather_equal, gather_texts
from moetrain.parallel.mesh import Mesh

log = logging.getLogger(__name__)
T = TypeVar("T")
DIGEST_BYTES = 16
PENDING, DONE, FAILED = 0, 1, 2
NOT_YET = "not yet"


@dataclass
class Pending:
    """A checkpoint on its way: ``written`` is this rank's file; then rank 0 has it ``committed``."""

    path: Path
    manifest: Manifest
    written: Future[Written]
    began: float
    committed: Future[None] | None = None
    num_bytes: int = 0

    @property
    def unfinished(self) -> Path:
        return self.path.with_name(self.path.name + ".tmp")


class Saver:
    """Writes the checkpoints of a run. Every rank has one, and all make the same calls.

    With ``background`` a save copies what is to be written and returns; threads without collectives do what touches the
    disk, and ``poll`` or ``finish`` sees them through. Disk errors are never raised: training is worth more than a
    checkpoint. They are counted in ``failed``, logged, and ``failure`` says what became of the latest save ("" while
    all is well).
    """

    def __init__(self, folder: Path, mesh: Mesh, saved_by: SavedBy, keep: Keep, *, background: bool) -> None:
        self._folder, self._mesh, self._saved_by, self._keep = folder, mesh, saved_by, keep
        self._background = background
        self._pending: Pending | None = None
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self.failed, self.failure = 0, ""
        self.newest: Path | None = None

    def save(self, step: int, state: State, generators: Iterable[Piece], extra: Mapping[str, Any]) -> None:
        """Begin a checkpoint of ``step``, after the one before is finished; without ``background``, finish it too.

        generators: this rank's. extra: rank 0's is kept. Raises TypeError or ValueError, before anything is written, if
        ``extra`` is not JSON. Collective.
        """
        json.dumps(extra, allow_nan=False)
        self.finish()
        began = perf_counter()
        path = self._folder / f"step_{step:08d}"
        pending = Pending(path, Manifest(step, self._saved_by, {}, dict(state.tensors), dict(extra)), Future(), began)
        if failure := self._on_main(lambda: _start(pending.unfinished)):
            self._fail(path, failure)
            return
        self._pending = pending
        contents = Contents([*state.shares, *generators])
        blocks = contents.copied(self._host_buffer(contents.num_bytes)) if self._background else contents.live()
        file = pending.unfinished / _file_of(self._mesh.rank)
        self._run(pending.written, lambda: write(file, contents.header(), blocks))
        if self._background:
            log.info("checkpoint %s: %.3f s to copy it", path.name, perf_counter() - began)
        else:
            self.finish()

    def reserve(self, state: State, generators: Iterable[Piece]) -> None:
        """Have the memory for background copies now, not with the first save: fresh pages cost more than the copy."""
        if self._background:
            self._host_buffer(Contents([*state.shares, *generators]).num_bytes).zero_()

    def poll(self) -> None:
        """At a step boundary: do what is next for the checkpoint that is pending, if any. Collective if so."""
        self._advance(wait=False)

    def finish(self) -> None:
        """Wait for the checkpoint that is pending, if any. Collective if so."""
        self._advance(wait=True)

    def _advance(self, *, wait: bool) -> None:
        pending = self._pending
        if pending is None:
            return
        if pending.committed is None:
            if wait:
                pending.written.exception()
            self._see_written(pending)
        if self._pending is None or pending.committed is None:
            return
        if wait:
            pending.committed.exception()
        failure = broadcast_text(_said(pending.committed), self._mesh.world_group)
        if failure != NOT_YET:
            self._end(pending, failure)

    def _see_written(self, pending: Pending) -> None:
        """If the files of all ranks are there, have rank 0 commit them."""
        row, failure = _outcome(pending.written)
        rows = gather_equal(torch.tensor(row, device=self._mesh.device), self._mesh.world_group).tolist()
        if any(row[0] == PENDING for row in rows):
            return
        if any(row[0] == FAILED for row in rows):
            failures = gather_texts(failure, self._mesh.world_group)
            self._end(pending, "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(failures) if text))
            return
        pending.committed, pending.num_bytes = Future(), sum(row[1] for row in rows)
        if self._mesh.is_main:
            self._run(pending.committed, lambda: self._commit(pending, rows))
        else:
            pending.committed.set_result(None)

    def _commit(self, pending: Pending, rows: list[list[int]]) -> None:
        """On rank 0. The rename is the moment at which the checkpoint comes into being."""
        files = {_file_of(rank): Written(row[1], bytes(row[2:]).hex()) for rank, row in enumerate(rows)}
        text = to_text(replace(pending.manifest, files=files))
        write(pending.unfinished / MANIFEST, text.encode(), [])
        sync_folder(pending.unfinished)
        if pending.path.exists():
            aside = pending.path.with_name(pending.path.name + ASIDE)
            if aside.exists():
                remove(aside)
            pending.path.rename(aside)
        pending.unfinished.rename(pending.path)
        sync_folder(self._folder)
        prune(self._folder, pending.path, self._keep)

    def _end(self, pending: Pending, failure: str) -> None:
        self._pending = None
        if failure:
            self._fail(pending.path, failure)
            return
        self.failure, self.newest = "", pending.path
        seconds, megabytes = perf_counter() - pending.began, pending.num_bytes / 1e6
        log.info("checkpoint %s: %.1f MB, whole after %.3f s", pending.path.name, megabytes, seconds)

    def _fail(self, path: Path, failure: str) -> None:
        self.failed += 1
        self.failure = f"checkpoint {path.name} could not be written: {failure}"
        log.warning(self.failure)
        if self._mesh.is_main:
            remove_unfinished(self._folder)

    def _on_main(self, act: Callable[[], None]) -> str:
        """Do it on rank 0 while the others wait; what went wrong there, on every rank."""
        failure = ""
        if self._mesh.is_main:
            try:
                act()
            except OSError as error:
                failure = f"rank 0: {error}"
        return broadcast_text(failure, self._mesh.world_group)

    def _run(self, outcome: Future[T], act: Callable[[], T]) -> None:
        """In a thread that does not outlive the process if ``background``, else now."""
        if self._background:
            threading.Thread(target=_settle, args=(outcome, act), daemon=True).start()
        else:
            _settle(outcome, act)

    def _host_buffer(self, num_bytes: int) -> torch.Tensor:
        """Kept from save to save: fresh pages cost more than the copy."""
        if self._buffer.numel() < num_bytes:
            pin = self._mesh.device.type != "cpu"
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pin)
        return self._buffer


def _settle(outcome: Future[T], act: Callable[[], T]) -> None:
    try:
        outcome.set_result(act())
    except BaseException as error:  # not lost in a thread: raised where the outcome is asked for
        outcome.set_exception(error)


def _outcome(written: Future[Written]) -> tuple[list[int], str]:
    """[state, bytes, *digest], and why it failed. What is no OSError is raised."""
    nothing = [0] * (1 + DIGEST_BYTES)
    if failure := _said(written):
        return [PENDING if failure == NOT_YET else FAILED, *nothing], failure
    result = written.result()
    return [DONE, result.bytes, *bytes.fromhex(result.xxh3)], ""


def _said(outcome: Future[Any]) -> str:
    """Why it failed, NOT_YET, or "" where all went well. What is no OSError is raised."""
    if not outcome.done():
        return NOT_YET
    error = outcome.exception()
    if error is not None and not isinstance(error, OSError):
        raise error
    return "" if error is None else f"{error}"


def _start(unfinished: Path) -> None:
    remove_unfinished(unfinished.parent)
    unfinished.mkdir(parents=True)


def _file_of(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"
