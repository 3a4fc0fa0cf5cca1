"""Requests to leave: a signal to any rank, or a file that rank 0 finds. Requests to save: another file.

What ranks were asked is voted on in ``Guard``, so that all of them save the same step and leave together.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from time import monotonic
from types import FrameType, TracebackType

log = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
ANOTHER_FILE = "MOETRAIN_STOP_FILE"
POLL_S = 1.0
SAME_S = 2.0


@dataclass(frozen=True)
class Left:
    """Training was left, saved, after ``step`` steps. reason: of every rank that was asked."""

    step: int
    reason: str


class Leave:
    """What this rank was asked; a context, within which it hears SIGTERM, SIGUSR2 and SIGINT.

    The first signal is a request, which ``asked`` tells from then on. One that comes later than ``SAME_S`` after it
    ends the process at once, also where it hangs in a collective: a thread listens. Within that time it is the same
    request, twice: Slurm signals every process of a job, and torchrun passes on what it gets.

    Files are looked for on rank 0, at most once in ``POLL_S`` seconds, as they may lie on a slow shared storage:
    STOP and SAVE in the run folder, and to stop also the one that the environment variable MOETRAIN_STOP_FILE names.
    """

    def __init__(self, rank: int, folder: Path) -> None:
        self._rank = rank
        named = os.environ.get(ANOTHER_FILE)
        self._stop_files = (folder / "STOP", *([Path(named)] if named else []))
        self._save_file = folder / "SAVE"
        self.reason = ""
        self._heard_at = 0.0
        self._looked_at = -POLL_S
        self._saves = False

    @property
    def asked(self) -> bool:
        """Whether this rank was asked to leave."""
        self._look()
        return bool(self.reason)

    def takes_save(self) -> bool:
        """Whether this rank was asked to save since the last call."""
        self._look()
        saves, self._saves = self._saves, False
        return saves

    def end(self, left: Left, marker: Path) -> None:
        """All ranks have done what they were asked: the next start finds the marker, and not the request again."""
        if self._rank != 0:
            return
        facts = asdict(left) | {"time": datetime.now().astimezone().isoformat()}
        marker.write_text(json.dumps(facts, indent=2) + "\n")
        for file in self._stop_files:
            file.unlink(missing_ok=True)
        _tell(f"left after step {left.step} ({left.reason}); the same command with run.id={marker.parent.name} goes on")

    def _look(self) -> None:
        if self._rank != 0 or monotonic() - self._looked_at < POLL_S:
            return
        self._looked_at = monotonic()
        if self._save_file.exists():
            self._save_file.unlink(missing_ok=True)
            self._saves = True
        found = [str(file) for file in self._stop_files if file.exists()]
        if found and not self.reason:
            self.reason = f"{found[0]} was there"

    def __enter__(self) -> Leave:
        self._ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        self._before_fd = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, _left_to_the_listener) for number in SIGNALS}
        self._listener = threading.Thread(target=self._listen, name="moetrain signals", daemon=True)
        self._listener.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._before_fd)
        self._mouth.close()
        self._listener.join()
        self._ear.close()

    def _listen(self) -> None:
        """Of each signal the interpreter writes its number to ``_mouth``, whatever the main thread is stuck in."""
        while numbers := self._ear.recv(64):
            for number in numbers:
                if number in SIGNALS:
                    self._hear(signal.Signals(number))

    def _hear(self, number: signal.Signals) -> None:
        if not self._heard_at:
            self._heard_at = monotonic()
            self.reason = self.reason or f"rank {self._rank} got {number.name}"
            log.warning("%s: saving after this step, then leaving", number.name)
            if self._rank == 0:
                _tell(f"{number.name}: saving after this step, then leaving; once more, and it leaves at once")
        elif monotonic() - self._heard_at > SAME_S:
            log.warning("%s again: leaving at once", number.name)
            if self._rank == 0:
                _tell(f"{number.name} again: leaving at once, without saving")
            os._exit(128 + number)


def _left_to_the_listener(number: int, frame: FrameType | None) -> None:
    """A signal needs some handler for its number to be written to the listener."""


def _tell(text: str) -> None:
    print(f"moetrain: {text}", file=sys.stderr, flush=True)
