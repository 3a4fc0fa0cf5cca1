"""All controllers of a run: made from its config, asked once a log window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetrain.config import Config
from moetrain.control.aux_coefficient import AuxCoefficient
from moetrain.control.base import Action, Controller, Seen
from moetrain.control.bias_rate import BiasRate
from moetrain.control.capacity import CapacityFactor
from moetrain.control.revive import Revive
from moetrain.control.shadow import Shadow
from moetrain.engine import Engine
from moetrain.models.block import is_moe_layer
from moetrain.models.decoder import Decoder
from moetrain.monitor.balance import summarise
from moetrain.monitor.window import WindowMeans
from moetrain.parallel.mesh import Mesh


class Control:
    """Every rank has one, and all make the same calls: what a window says was summed over all ranks, so that all decide
    alike without asking each other.
    """

    def __init__(self, config: Config, model: Decoder, engine: Engine, mesh: Mesh) -> None:
        self._config, self._mesh = config, mesh
        self._layers = [i for i in range(config.model.num_layers) if is_moe_layer(config.model, i)]
        self._controllers = _controllers(config, model, engine, mesh)

    def act(self, done: int, means: WindowMeans) -> list[Action]:
        """After ``done`` steps, of which the window ``means`` are the last ones. Not after the last step of the run:
        what is evaluated and saved then shall be what was trained. Collective.
        """
        if not self._controllers or means.load is None or done == self._config.train.steps:
            return []
        balance = summarise(means.load, self._mesh.ep_size, self._layers)
        share = done / self._config.train.steps
        counts = means.load.assigned_LE.numpy(), means.load.kept_LE.numpy()
        seen = Seen(done, share, means.num_steps, balance, *counts)
        return [action for one in self._controllers.values() for action in one.act(seen)]

    def numbers(self) -> dict[str, float]:
        """What is in force, by the names it is logged under; nothing where nothing is steered."""
        return {name: value for one in self._controllers.values() for name, value in one.numbers().items()}

    def state(self) -> dict[str, Any]:
        """Plain JSON, for the checkpoint."""
        return {name: one.state() for name, one in self._controllers.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from there. A controller of which ``state`` knows nothing starts anew."""
        for name in self._controllers.keys() & state.keys():
            self._controllers[name].load(state[name])


def _controllers(config: Config, model: Decoder, engine: Engine, mesh: Mesh) -> dict[str, Controller]:
    """Those that are on, by the names under which their states are saved, in the order in which they act."""
    control, found = config.control, dict[str, Controller]()
    if control.target_max_vio is not None:
        found["aux"] = AuxCoefficient(control, control.target_max_vio, model)
    if control.target_drop is not None:
        factor = config.capacity.factor_train
        assert factor is not None
        found["capacity"] = CapacityFactor(control, control.target_drop, model, factor)
    if control.bias_decay_from is not None:
        found["bias"] = BiasRate(control.bias_decay_from, model, model.moe_layers()[0].router.bias_rate)
    if control.revive_after_steps is not None:
        found["revive"] = Revive(config, control.revive_after_steps, model, engine, mesh)
    if control.shadow_gain is not None:
        found["shadow"] = Shadow(config, control.shadow_gain, model, mesh)
    return found
