"""The rate at which a selection bias moves, taken to zero over the last part of the run.

DeepSeek-V3 sets it to zero for the last 500 B of 14.8 T tokens: a bias that goes on moving by a fixed step never comes
to rest, and the model trains against it to the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetrain.control.base import Action, Seen, changed
from moetrain.models.decoder import Decoder


def decayed(rate: float, share: float, start: float) -> float:
    """``rate`` up to the share ``start`` of the run, then linear to 0 at its end."""
    return rate * min(1.0, (1.0 - share) / (1.0 - start))


class BiasRate:
    """Follows ``decayed`` from window to window; balance has no part in it."""

    def __init__(self, start: float, model: Decoder, rate: float) -> None:
        """rate: what the run starts with."""
        self._start, self._model, self._first, self._value = start, model, rate, rate

    def act(self, seen: Seen) -> list[Action]:
        old = self._value
        self._set(decayed(self._first, seen.share, self._start))
        return changed("bias_rate", old, self._value, f"{seen.share:.1%} of the run is done")

    def state(self) -> dict[str, Any]:
        return {"value": self._value}

    def load(self, state: Mapping[str, Any]) -> None:
        self._set(state["value"])

    def numbers(self) -> dict[str, float]:
        return {"control/bias_rate": self._value}

    def _set(self, value: float) -> None:
        self._value = value
        self._model.set_bias_rate(value)
