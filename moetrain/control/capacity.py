"""The capacity factor of training, steered to a target share of dropped assignments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetrain.config import ControlConfig
from moetrain.control.base import Action, Limits, Seen, changed, steered
from moetrain.models.decoder import Decoder


class CapacityFactor:
    """Raised while more is dropped than the target, lowered while less. All layers have one factor, as padded buffers
    have one shape on all ranks; evaluation keeps its own.
    """

    def __init__(self, control: ControlConfig, target: float, model: Decoder, factor: float) -> None:
        """factor: what the run starts with."""
        self._limits = Limits(control.capacity_min, control.capacity_max, control.capacity_step)
        self._target, self._model, self._value = target, model, factor

    def act(self, seen: Seen) -> list[Action]:
        dropped, old = seen.balance.drop_fraction, self._value
        self._set(steered(old, dropped / self._target, self._limits))
        why = f"{dropped:.2%} were dropped, the target is {self._target:.2%} {self._limits}"
        return changed("capacity_factor", old, self._value, why)

    def state(self) -> dict[str, Any]:
        return {"value": self._value}

    def load(self, state: Mapping[str, Any]) -> None:
        self._set(state["value"])

    def numbers(self) -> dict[str, float]:
        return {"control/capacity_factor": self._value}

    def _set(self, value: float) -> None:
        self._value = value
        self._model.set_capacity_factor(value)
