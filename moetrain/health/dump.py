"""What a rank leaves behind when training hangs or breaks: RUN/hang/rank_N.json."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moetrain.health import flight
from moetrain.health.flight import Collective, Flight


@dataclass(frozen=True)
class Dump:
    """One rank at one moment. step: the one at hand, from 1. silence_s: since the last sign of life in ``phase``.

    error: the exception that ended training here, "" if there was none. thrown: out of a collective. stack: of the
    main thread, or of the exception, the innermost call last, as "file:line function". flight: the collectives it has
    begun.
    """

    rank: int
    world_size: int
    host: str
    pid: int
    step: int
    phase: str
    silence_s: float
    error: str
    thrown: bool
    stack: list[str]
    threads: dict[str, list[str]]
    flight: Flight

    @property
    def place(self) -> str:
        """The innermost call in moetrain and the innermost of all."""
        if not self.stack:
            return "no stack"
        ours = [line for line in self.stack if "moetrain" in line.rpartition(":")[0]]
        inner = [ours[-1]] if ours else []
        return " -> ".join([*inner, *([self.stack[-1]] if self.stack[-1] not in inner else [])])


def dump_of(rank: int, world_size: int, at: tuple[int, str, float], error: BaseException | None) -> Dump:
    """This process, now. at: step, phase and seconds since the last sign of life."""
    step, phase, silence_s = at
    threads = _stacks()
    main = threads.pop("MainThread", [])
    return Dump(
        rank=rank,
        world_size=world_size,
        host=socket.gethostname(),
        pid=os.getpid(),
        step=step,
        phase=phase,
        silence_s=round(silence_s, 1),
        error="" if error is None else f"{type(error).__name__}: {error}",
        thrown=error is not None and is_of_collective(error),
        stack=main if error is None else _lines(traceback.extract_tb(error.__traceback__)),
        threads=threads,
        flight=flight.read(),
    )


def is_of_collective(error: BaseException) -> bool:
    """Whether it says that another rank is lost or late. Gloo throws plain RuntimeErrors that begin with where in its
    source they come from.
    """
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def write(folder: Path, dump: Dump) -> None:
    """All or nothing. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank_{dump.rank}.json"
    fresh = path.with_name(f"{path.name}.{threading.get_ident()}.new")
    fresh.write_text(json.dumps(dataclasses.asdict(dump), indent=1) + "\n")
    fresh.replace(path)


def read_all(folder: Path) -> dict[int, Dump]:
    """Rank -> what it has left in ``folder``."""
    found = [_dump(json.loads(path.read_text())) for path in folder.glob("rank_*.json")]
    return {dump.rank: dump for dump in sorted(found, key=lambda dump: dump.rank)}


def _dump(raw: dict[str, Any]) -> Dump:
    told = raw.pop("flight")
    collectives = [Collective(**one) for one in told["collectives"]]
    return Dump(**raw, flight=Flight(told["ranks"], collectives, told["problem"]))


def _stacks() -> dict[str, list[str]]:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames().items()
    return {names.get(ident, str(ident)): _lines(traceback.extract_stack(frame)) for ident, frame in frames}


def _lines(stack: traceback.StackSummary) -> list[str]:
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in stack]
