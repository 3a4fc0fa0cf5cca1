"""The coefficient of the balance loss, steered to a target MaxVio."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetrain.config import ControlConfig
from moetrain.control.base import Action, Limits, Seen, changed, steered
from moetrain.models.decoder import Decoder


class AuxCoefficient:
    """Raised while MaxVio (mean over layers, of the counts of the window) is over its target, lowered while under."""

    def __init__(self, control: ControlConfig, target: float, model: Decoder) -> None:
        self._limits = Limits(control.aux_min, control.aux_max, control.aux_step)
        self._target, self._model, self._value = target, model, model.balance.balance_coef

    def act(self, seen: Seen) -> list[Action]:
        vio, old = seen.balance.max_vio_mean, self._value
        self._set(steered(old, vio / self._target, self._limits))
        why = f"MaxVio is {vio:.3g}, the target {self._target:g} {self._limits}"
        return changed("balance_coef", old, self._value, why)

    def state(self) -> dict[str, Any]:
        return {"value": self._value}

    def load(self, state: Mapping[str, Any]) -> None:
        self._set(state["value"])

    def numbers(self) -> dict[str, float]:
        return {"control/balance_coef": self._value}

    def _set(self, value: float) -> None:
        self._value = value
        self._model.set_balance_coef(value)
