"""The load over the last windows: what one window is too short to tell."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
NUM_WINDOWS = 10


class Running:
    """The last ten windows of global counts before dropping, int64 [L, E]; fewer after a start, which knows of none."""

    def __init__(self, layers: Sequence[int]) -> None:
        self._layers = layers
        self._windows: deque[NDArray[np.int64]] = deque(maxlen=NUM_WINDOWS)

    def add(self, assigned_LE: NDArray[np.int64]) -> dict[str, float]:
        """One more window -> the numbers up to it.

        max_vio_running, dead_running: of the sum of the windows (MaxVio as in balance.py; experts without any token).
        churn: share of assignments that would have to move to give the load of the window before, half of the sum of
        absolute differences; churn_two: the same against the window before that. A load that swings to and fro has
        much churn and little churn_two. balance/...: the worst layer, and the sum of the dead.
        """
        self._windows.append(assigned_LE)
        total_LE = np.sum(self._windows, axis=0, dtype=np.float64)
        mean_L = total_LE.mean(axis=1)
        columns = {
            "max_vio_running": total_LE.max(axis=1) / np.where(mean_L == 0, np.nan, mean_L) - 1.0,
            "dead_running": (total_LE == 0).sum(axis=1).astype(np.float64),
            "churn": self._churn(1),
            "churn_two": self._churn(2),
        }
        numbers = {
            f"moe/layer_{n:02d}/{name}": float(v[i]) for i, n in enumerate(self._layers) for name, v in columns.items()
        }
        return numbers | {
            "balance/max_vio_running": float(np.max(columns["max_vio_running"])),
            "balance/dead_running": float(np.sum(columns["dead_running"])),
            "balance/churn": float(np.max(columns["churn"])),
        }

    def _churn(self, back: int) -> Array:
        """[L]; 0 where there is no such window yet."""
        if len(self._windows) <= back:
            return np.zeros(len(self._layers))
        now_LE, then_LE = (_share(self._windows[-1 - age]) for age in (0, back))
        return np.asarray(0.5 * np.abs(now_LE - then_LE).sum(axis=1))


def _share(counts_LE: NDArray[np.int64]) -> Array:
    total_L1 = counts_LE.sum(axis=1, keepdims=True, dtype=np.float64)
    return np.asarray(counts_LE / np.where(total_L1 == 0, np.nan, total_L1))
