"""Dead experts, found by global counts and restarted from busy ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrain.config import Config
from moetrain.control.base import Action, Seen
from moetrain.control.restart import Restart, restart
from moetrain.engine import Engine
from moetrain.models.decoder import Decoder
from moetrain.ops.init import Draw
from moetrain.parallel.mesh import Mesh

Counts = NDArray[np.int64]


def sources(dead_E: NDArray[np.bool_], assigned_E: Counts) -> list[tuple[int, int]]:
    """(dead expert, busy expert to copy) for each that is dead, in order of their ids.

    Each time the expert with the most assignments per copy of it, the lower id first; none where nothing was assigned.
    """
    load_E = assigned_E.astype(np.float64)
    if not load_E.any():
        return []
    copies_E = np.ones_like(load_E)
    pairs = []
    for expert in np.flatnonzero(dead_E).tolist():
        source = int((load_E / copies_E).argmax())
        copies_E[source] += 1
        pairs.append((expert, source))
    return pairs


class Revive:
    """An expert without any token in ``after`` steps (counted in whole windows) is restarted, at most ``revive_max``
    times in a run.
    """

    def __init__(self, config: Config, after: int, model: Decoder, engine: Engine, mesh: Mesh) -> None:
        self._config, self._after = config, after
        self._model, self._engine, self._mesh = model, engine, mesh
        shape = (len(model.moe_layers()), config.experts.num_experts)
        self._idle_LE: Counts = np.zeros(shape, dtype=np.int64)
        self._times_LE: Counts = np.zeros(shape, dtype=np.int64)

    def act(self, seen: Seen) -> list[Action]:
        self._idle_LE = np.where(seen.assigned_LE == 0, self._idle_LE + seen.num_steps, 0)
        dead_LE = (self._idle_LE >= self._after) & (self._times_LE < self._config.control.revive_max)
        pairs_L = [sources(dead_E, assigned_E) for dead_E, assigned_E in zip(dead_LE, seen.assigned_LE, strict=True)]
        restarts = [Restart(layer, *pair) for layer, pairs in enumerate(pairs_L) for pair in pairs]
        if not restarts:
            return []
        draw = Draw(self._config.run.seed).of(f"revive.{seen.step}")
        restart(self._engine, self._model, self._mesh, restarts, draw, self._config.control.revive_noise)
        for one in restarts:
            self._idle_LE[one.layer, one.expert] = 0
            self._times_LE[one.layer, one.expert] += 1
        layers = [one.layer for one in seen.balance.layers]
        return [self._action(number, pairs) for number, pairs in zip(layers, pairs_L, strict=True) if pairs]

    def state(self) -> dict[str, Any]:
        return {"idle": self._idle_LE.tolist(), "times": self._times_LE.tolist()}

    def load(self, state: Mapping[str, Any]) -> None:
        self._idle_LE = np.array(state["idle"], dtype=np.int64)
        self._times_LE = np.array(state["times"], dtype=np.int64)

    def numbers(self) -> dict[str, float]:
        return {"control/restarts": float(self._times_LE.sum())}

    def _action(self, layer: int, pairs: list[tuple[int, int]]) -> Action:
        why = f"no token in {self._after} steps"
        listed = ", ".join(f"{expert} from {source}" for expert, source in pairs)
        data = {"what": "experts", "layer": layer, "experts": [e for e, _ in pairs], "from": [s for _, s in pairs]}
        return Action(f"layer {layer}: experts restarted ({listed}): {why}", data | {"why": why})
