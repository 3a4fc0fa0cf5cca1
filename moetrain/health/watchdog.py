"""A hang becomes an end with a report: of a rank that others wait for, and of ranks that wait for it.

Process groups have a timeout, and throw. What does not throw (a rank that hangs in Python or in the file system, a wait
that blocks for ever) is ended by a thread of its own, on each rank. Either way the rank writes RUN/hang/rank_N.json,
and the lowest one that could do so writes RUN/hang/report.txt from all of them.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from pathlib import Path
from time import monotonic, sleep
from types import TracebackType

from moetrain.health import dump, hang
from moetrain.health.rollback import Unstable
from moetrain.parallel.mesh import Mesh
from moetrain.types import ConfigError

log = logging.getLogger(__name__)
HUNG = 3
"""The exit code of a rank that hangs or has lost others."""
GRACE_S = 5.0
"""How long a rank waits for what the others leave behind."""
ASK_S = 2.0
"""After this long without a beat a rank looks whether another has left something behind, and does so too."""
MOST_LATER_S = 10.0
START_S = 300.0
"""To build a model and read a checkpoint takes its time, whatever the timeout of a collective."""
LOOK_EVERY_S, LOOK_S = 1.0, 0.05


class Watchdog:
    """A context around training. Every rank has one; without other ranks it does nothing.

    Who has left something behind makes the others do so too, which look into the run folder when they wait for long.
    It wants a ``beat`` at least every ``timeout_s`` seconds, from the first one on; for that it waits START_S if that
    is more. After as many without one it writes down where this rank is; somewhat later, when a process group of the
    same timeout would have thrown, it ends the process with HUNG.
    """

    def __init__(self, folder: Path, mesh: Mesh, timeout_s: float) -> None:
        """folder: of the run. What an earlier start has left in it is moved away."""
        self._folder, self._mesh, self._timeout_s = folder / "hang", mesh, timeout_s
        self._later_s = min(MOST_LATER_S, timeout_s / 2)
        self._at = (0, "start", monotonic())
        self._over = threading.Event()
        self._lock, self._has_error = threading.Lock(), False
        if mesh.is_main and self._folder.exists():
            number = 1 + sum(1 for _ in folder.glob("hang.*"))
            self._folder.rename(folder / f"hang.{number}")

    def __enter__(self) -> Watchdog:
        self._at = (0, "start", monotonic())
        if self._mesh.world_group is not None:
            for act in (self._watch, self._note):
                threading.Thread(target=act, name=f"watchdog {act.__name__}", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """An exception is written down before it goes on, for others will wait for this rank; one that says that others
        are lost goes no further, as whoever has lost ranks can not leave in good order: the process ends with HUNG.
        What all ranks raise alike (a mistake in the configuration) is none of ours, nor is an exit that was asked for.
        """
        alike = isinstance(error, (ConfigError, Unstable))
        if not isinstance(error, Exception) or alike or self._mesh.world_group is None:
            self._over.set()
            return
        log.error("training ends on this rank", exc_info=error)
        step, phase, _began = self._at
        self._write(error)
        if dump.is_of_collective(error):
            self._report()
            os._exit(HUNG)
        self._at = (step, f"leaving, after {phase}", monotonic())  # to leave may hang too: the thread goes on

    def beat(self, phase: str | None = None, step: int | None = None) -> None:
        """This rank is alive: in ``phase`` of ``step`` (from 1), both as before where they are not given."""
        self._at = (self._at[0] if step is None else step, phase or self._at[1], monotonic())

    def _watch(self) -> None:
        """Ends the process. It touches no file itself: the storage of the run may be what hangs."""
        while not self._over.wait(LOOK_EVERY_S):
            if self._late_s() > self._later_s:
                report = threading.Thread(target=self._report, daemon=True)
                report.start()
                report.join(3 * GRACE_S)
                if report.is_alive():
                    step, phase, _began = self._at
                    told = f"rank {self._mesh.rank} hangs in step {step}, {phase}; {self._folder} answers no more"
                    print(f"moetrain: {told}", file=sys.stderr, flush=True)
                os._exit(HUNG)

    def _note(self) -> None:
        """Writes down where this rank is, once for each beat that was the last for too long."""
        told = 0.0
        while not self._over.wait(LOOK_EVERY_S):
            beat = self._at[2]
            is_asked = monotonic() - beat > ASK_S and self._folder.exists()
            if (self._late_s() > 0 or is_asked) and told != beat:
                told = beat
                self._write(None)

    def _late_s(self) -> float:
        _step, phase, beat = self._at
        return monotonic() - beat - (max(self._timeout_s, START_S) if phase == "start" else self._timeout_s)

    def _write(self, error: Exception | None) -> None:
        step, phase, beat = self._at
        at = (step, phase, monotonic() - beat)
        try:
            with self._lock:
                if self._has_error and error is None:
                    return
                self._has_error = error is not None
                dump.write(self._folder, dump.dump_of(self._mesh.rank, self._mesh.world_size, at, error))
        except Exception as failure:  # whatever it is, it must not stand in the way of the end, nor of the error itself
            print(f"moetrain: rank {self._mesh.rank} can not say where it is: {failure!r}", file=sys.stderr, flush=True)

    def _report(self) -> None:
        """Once in the run folder and once to stderr, by the lowest rank that has left something behind; the others wait
        for it, for torchrun ends all ranks as soon as one has gone.
        """
        path, deadline = self._folder / "report.txt", monotonic() + GRACE_S
        try:
            while len(list(self._folder.glob("rank_*.json"))) < self._mesh.world_size and monotonic() < deadline:
                sleep(LOOK_S)
            dumps = dump.read_all(self._folder)
            while self._mesh.rank != min(dumps) and not path.exists() and monotonic() < deadline + GRACE_S:
                sleep(LOOK_S)
            if not path.exists():
                self._publish(path, hang.report(dumps, self._mesh.world_size))
        except Exception as failure:
            print(f"moetrain: rank {self._mesh.rank} can not write {path}: {failure!r}", file=sys.stderr, flush=True)

    def _publish(self, path: Path, text: str) -> None:
        fresh = path.with_name(f"{path.name}.{self._mesh.rank}")
        fresh.write_text(text)
        try:
            path.hardlink_to(fresh)
        except FileExistsError:
            return
        finally:
            fresh.unlink()
        print(f"moetrain: {text}\nmore of each rank: {path.parent}", file=sys.stderr, flush=True)
