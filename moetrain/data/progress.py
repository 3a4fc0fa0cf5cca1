"""How far a preparation is: a live line on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.status import Status

EVERY_S = 10.0
LIVE_S = 0.2


class Progress:
    """Counts of one preparation, shown on stderr while it runs."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.num_documents = self.num_bytes = self.num_tokens = 0
        self._start = self._shown = time.monotonic()
        self._status = Status(escape(label), console=Console(stderr=True)) if sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def add(self, num_documents: int, num_bytes: int, num_tokens: int) -> None:
        self.num_documents += num_documents
        self.num_bytes += num_bytes
        self.num_tokens += num_tokens
        now = time.monotonic()
        if now - self._shown >= (EVERY_S if self._status is None else LIVE_S):
            self._shown = now
            self.say(self._counts(now))

    def say(self, what: str) -> None:
        """Replace the live line, or print one where there is none."""
        line = f"{self.label}: {what}"
        if self._status is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._status.update(escape(line))

    def _counts(self, now: float) -> str:
        megabytes = self.num_bytes / 1e6
        rate = megabytes / max(now - self._start, 1e-9)
        return f"{self.num_documents:,} documents, {megabytes:,.1f} MB, {self.num_tokens:,} tokens, {rate:,.1f} MB/s"
