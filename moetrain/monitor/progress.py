"""One tidy live line on a terminal; elsewhere one plain line every log interval."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from time import monotonic
from typing import TextIO

REDRAW_S = 0.1
ERASE = "\r\x1b[2K"


@dataclass(frozen=True)
class Status:
    """What the line says after ``step`` of ``steps`` optimiser steps. None: not known (yet), or no experts to speak of.

    loss: nats per token. seconds_left: until the last step. drop_fraction: of the assignments of the last window.
    load_max: load of the worst expert over its fair share.
    """

    step: int
    steps: int
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    drop_fraction: float | None = None
    load_max: float | None = None


def line(status: Status, bar_width: int = 0) -> str:
    """The status in words, without control characters; with ``bar_width`` > 0 a bar is drawn before it."""
    width = len(str(status.steps))
    parts = [f"step {status.step:>{width}}/{status.steps}"]
    if bar_width:
        done = round(bar_width * status.step / status.steps)
        parts.append("━" * done + "─" * (bar_width - done))
    if status.loss is not None:
        parts.append(f"loss {status.loss:.3f}")
    if status.tokens_per_second is not None:
        parts.append(f"{thousands(status.tokens_per_second)} tokens/s")
    if status.seconds_left is not None:
        parts.append(f"ETA {clock(status.seconds_left)}")
    if status.drop_fraction is not None:
        parts.append(f"drop {status.drop_fraction:.1%}")
    if status.load_max is not None:
        parts.append(f"worst expert {status.load_max:.2f}x")
    return "  ".join(parts)


class Progress:
    """Made on rank 0 only, and only if the user wants it. ``stream`` is normally stderr."""

    def __init__(self, stream: TextIO, log_every: int) -> None:
        self._stream = stream
        self._log_every = log_every
        self._live = stream.isatty()
        self._drawn_at = -REDRAW_S
        self._on_screen = ""

    def update(self, status: Status) -> None:
        """After every step. A terminal is redrawn at most ten times a second, a file gets a line every log interval."""
        last = status.step == status.steps
        if not self._live:
            if last or status.step % self._log_every == 0:
                self._write(line(status) + "\n")
            return
        now = monotonic()
        if last or now - self._drawn_at >= REDRAW_S:
            self._drawn_at = now
            self._on_screen = _fit(status, shutil.get_terminal_size().columns - 1)
            self._write(ERASE + self._on_screen)

    def say(self, text: str) -> None:
        """A line that stays, above the live one."""
        self._write(f"{ERASE}{text}\n{self._on_screen}" if self._live else text + "\n")

    def close(self) -> None:
        """Leave the last state standing and go to a fresh line."""
        if self._on_screen:
            self._on_screen = ""
            self._write("\n")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def thousands(value: float) -> str:
    """1234 -> 1.2k, 1234567 -> 1.2M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{suffix}"
    return f"{value:.0f}"


def clock(seconds: float) -> str:
    """75 -> 1:15, 3675 -> 1:01:15, 90000 -> 1d 1:00:00."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    day = f"{days}d " if days else ""
    return f"{day}{hour}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _fit(status: Status, columns: int) -> str:
    """The bar takes the room that is left, up to 24 columns; a narrow terminal cuts the line, it never wraps."""
    room = columns - len(line(status)) - 2
    return line(status, min(room, 24) if room >= 6 else 0)[:columns]
