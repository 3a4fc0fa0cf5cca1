"""Where a step's time goes: seconds per phase, over forward and backward alike."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from time import perf_counter
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Phase = Literal[
    "rest",
    "route",
    "dispatch",
    "exchange",
    "experts",
    "combine",
    "attention",
    "vocabulary",
    "update",
    "data",
    "metrics",
]


class Clock(Protocol):
    """Adds up the time between marks, under the name of the phase that was current."""

    def mark(self, phase: Phase) -> None: ...

    def drain(self) -> dict[str, float]: ...


class HostClock:
    """perf_counter: right where the host itself does the work."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._phase: Phase = "rest"
        self._since = perf_counter()

    def mark(self, phase: Phase) -> None:
        now = perf_counter()
        self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def drain(self) -> dict[str, float]:
        self.mark(self._phase)
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds


class DeviceClock:
    """Events on the accelerator's current stream: the host runs ahead of it and waits only in ``drain``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[Phase, Any]] = [("rest", self._record())]

    def _record(self) -> Any:
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def mark(self, phase: Phase) -> None:
        self._marks.append((phase, self._record()))

    def drain(self) -> dict[str, float]:
        last_phase = self._marks[-1][0]
        self.mark(last_phase)
        marks, self._marks = self._marks, self._marks[-1:]
        marks[-1][1].synchronize()
        seconds: defaultdict[str, float] = defaultdict(float)
        for (phase, start), (_, end) in pairwise(marks):
            seconds[phase] += start.elapsed_time(end) / 1000.0
        return dict(seconds)


class _Border(torch.autograd.Function):
    """The identity, crossed from ``before`` to ``after`` in forward and the other way in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock, before: Phase) -> Tensor:
        ctx.clock, ctx.before = clock, before
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.clock.mark(ctx.before)
        return grads[0], None, None


class Timeline:
    """Splits elapsed time by phase. At any moment one phase is current; time starts in ``rest``.

    Autograd runs nodes in the opposite order of their making, so a border put on the tensor that leads from one phase
    to the next is crossed at the right moment in backward too, side branches included. Under activation recompute
    (non-reentrant checkpointing) the recomputed forward counts to its phases, like any other forward; it stops at the
    operation whose backward asked for it, that is in the phase it was called from.

    On an accelerator every mark keeps an event until the next ``drain``: drain at least once every few steps.
    """

    def __init__(self, device: torch.device, enabled: bool = True) -> None:
        """The clock is chosen by ``device``. Disabled: no marks, no autograd nodes, ``drain`` gives an empty dict."""
        self._clock = _clock_of(device) if enabled else None

    def mark(self, phase: Phase) -> None:
        """From now on time belongs to ``phase``."""
        if self._clock is not None:
            self._clock.mark(phase)

    def through(self, x: Tensor, before: Phase, after: Phase) -> Tensor:
        """x itself, of any shape: forward goes on in ``after``, and backward through x goes on in ``before``.

        Where gradients are recorded the result is a view of x that must not be changed in place.
        """
        if self._clock is None:
            return x
        self._clock.mark(after)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        out: Tensor = _Border.apply(x, self._clock, before)
        return out

    def drain(self) -> dict[str, float]:
        """Seconds per phase since the last drain (or since construction); waits for the device if there is one."""
        return {} if self._clock is None else self._clock.drain()


def _clock_of(device: torch.device) -> Clock:
    return HostClock() if device.type == "cpu" else DeviceClock(device)
