"""Which steps stand out: a rolling median and the median absolute deviation from it, of good steps only."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

LEAST = 16
"""Good steps before anything is called an outlier."""
SIGMA = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""
FLOOR = 0.01
"""Of the median: no deviation counts as smaller, or the first wobble of a run that stands still would stand out."""


class Outliers:
    """Loss and gradient norm of the last ``window`` good steps. ``sigmas`` None: only what is not finite is bad."""

    def __init__(self, sigmas: float | None, window: int) -> None:
        self._sigmas = sigmas
        self._losses: deque[float] = deque(maxlen=window)
        self._norms: deque[float] = deque(maxlen=window)

    def reason(self, loss: float, norm: float) -> str:
        """Why a step of this loss and norm is bad; "" if it is good, and then it is remembered."""
        found = self._found("loss", loss, self._losses) or self._found("gradient norm", norm, self._norms)
        if not found:
            self._losses.append(loss)
            self._norms.append(norm)
        return found

    def state(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "norms": list(self._norms)}

    def load(self, state: Mapping[str, Any]) -> None:
        for kept, values in ((self._losses, "losses"), (self._norms, "norms")):
            kept.clear()
            kept.extend(state.get(values, []))

    def _found(self, what: str, value: float, before: Sequence[float]) -> str:
        if not math.isfinite(value):
            return f"the {what} is {value}"
        if self._sigmas is None or len(before) < LEAST:
            return ""
        middle = median(before)
        spread = max(SIGMA * median(abs(one - middle) for one in before), FLOOR * abs(middle))
        if value <= middle + self._sigmas * spread:
            return ""
        return f"the {what} is {value:.4g}, {(value - middle) / spread:.1f} deviations over its median {middle:.4g}"
