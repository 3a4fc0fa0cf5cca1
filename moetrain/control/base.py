"""What a controller sees and does, and the one law by which numbers are steered."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moetrain.monitor.balance import Balance

BAND = 0.1
"""A measurement within this share of its target moves nothing: counts of a few steps are noisy."""


@dataclass(frozen=True)
class Seen:
    """The window that ended after ``step`` steps, over all ranks, so the same on every rank.

    share: of the run that is done. num_steps: of the window. assigned_LE, kept_LE: assignments before dropping and
    after it.
    """

    step: int
    share: float
    num_steps: int
    balance: Balance
    assigned_LE: NDArray[np.int64]
    kept_LE: NDArray[np.int64]


@dataclass(frozen=True)
class Action:
    """What a controller did. message: what and why, for people; data: the plain values behind it."""

    message: str
    data: Mapping[str, object]


class Controller(Protocol):
    """Decides by what it saw and by its own state alone, so every rank decides alike.

    What a controller has done must follow from ``state``: a resumed run acts as the uninterrupted one would have.
    """

    def act(self, seen: Seen) -> list[Action]:
        """Look at a window, and change what has to be changed. It may be collective."""

    def state(self) -> dict[str, Any]:
        """Plain JSON."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Be as the one that gave ``state``, and put in force what it had."""

    def numbers(self) -> dict[str, float]:
        """What is in force, for the log."""


@dataclass(frozen=True)
class Limits:
    """low <= value <= high; one window changes it by at most a factor of ``step`` > 1, but brings it in at once where a
    run starts it out of bounds.
    """

    low: float
    high: float
    step: float

    def __str__(self) -> str:
        return f"within {self.low:g} to {self.high:g}"


def steered(value: float, ratio: float, limits: Limits) -> float:
    """``value`` times ``ratio`` (measured over target), within the limits.

    For a value that lowers what is measured. A ratio within ``BAND`` of 1, or none at all (NaN), leaves it as it is.
    """
    if math.isnan(ratio) or abs(ratio - 1.0) <= BAND:
        return min(max(value, limits.low), limits.high)
    factor = min(max(ratio, 1.0 / limits.step), limits.step)
    return min(max(value * factor, limits.low), limits.high)


def changed(what: str, old: float, new: float, why: str) -> list[Action]:
    """The action that set ``what``; none where nothing changed."""
    if old == new:
        return []
    return [Action(f"{what} {old:.4g} -> {new:.4g}: {why}", {"what": what, "old": old, "new": new, "why": why})]
