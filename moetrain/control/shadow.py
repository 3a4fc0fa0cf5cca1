"""Hot experts, found by global counts and shadowed where that saves time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from moetrain.config import Config
from moetrain.control.base import Action, Seen
from moetrain.control.cost import Cost, Load, Rates, cheapest, cost, load_of
from moetrain.control.rates import measure_rates, measured_on
from moetrain.models.decoder import Decoder
from moetrain.parallel.mesh import Mesh


class Shadow:
    """Changes which experts of a layer are shadowed where the cost model says that at least ``gain`` of the layer's
    time is saved by it, so that it does not do and undo the same thing from window to window.

    What the model is fed with is measured once, before the first decision. It is saved, so that a resumed run decides
    as the uninterrupted one would have; on other devices or under another layout it is measured anew. A rank that holds
    all experts lends none.
    """

    def __init__(self, config: Config, gain: float, model: Decoder, mesh: Mesh) -> None:
        """Collective."""
        self._config, self._gain, self._model, self._mesh = config, gain, model, mesh
        self._rates: Rates | None = None
        self._here = measured_on(config, mesh)
        self._hot_L: list[tuple[int, ...]] = [()] * len(model.moe_layers())

    def act(self, seen: Seen) -> list[Action]:
        if self._mesh.ep_size == 1:
            return []
        actions = []
        if self._rates is None:
            self._rates = measure_rates(self._config, self._model.moe_layers()[0], self._mesh)
            actions.append(_measured(self._rates))
        for index, layer in enumerate(seen.balance.layers):
            load, before = self._load(seen, index), self._hot_L[index]
            after = cheapest(load, self._config.control.shadow_max, self._rates)
            costs = cost(load, before, self._rates), cost(load, after, self._rates)
            if costs[0].seconds - costs[1].seconds > self._gain * costs[0].seconds:
                self._hot_L[index] = after
                actions.append(self._changed(layer.layer, load, (before, after), costs))
        self._model.set_shadows(self._hot_L)
        return actions

    def state(self) -> dict[str, Any]:
        rates = None if self._rates is None else asdict(self._rates)
        return {"hot": [list(hot) for hot in self._hot_L], "rates": rates, "measured_on": self._here}

    def load(self, state: Mapping[str, Any]) -> None:
        self._hot_L = [tuple(hot) if self._mesh.ep_size > 1 else () for hot in state["hot"]]
        self._model.set_shadows(self._hot_L)
        rates = state["rates"]
        self._rates = Rates(**rates) if rates is not None and state.get("measured_on") == self._here else None

    def numbers(self) -> dict[str, float]:
        return {"control/shadowed": float(sum(len(hot) for hot in self._hot_L))}

    def _load(self, seen: Seen, index: int) -> Load:
        """Of a micro-batch of an EP group, the mean of all in the window."""
        groups = self._mesh.world_size / self._mesh.ep_size
        rows_E = seen.kept_LE[index] / (seen.num_steps * self._num_micro_batches * groups)
        return load_of(self._config, rows_E)

    @property
    def _num_micro_batches(self) -> int:
        """Of a step, on a rank."""
        train = self._config.train
        return train.global_batch // (train.micro_batch * self._mesh.world_size)

    def _changed(
        self, layer: int, load: Load, hots: tuple[tuple[int, ...], tuple[int, ...]], costs: tuple[Cost, Cost]
    ) -> Action:
        fair = load.rows_E.sum() / self._mesh.ep_size
        each = [one.rows / fair for one in costs]
        ms = [1e3 * one.seconds * self._num_micro_batches for one in costs]
        copies = [one.copies for one in costs]
        why = (
            f"busiest rank {each[0]:.2f}x -> {each[1]:.2f}x its share of {fair:.0f} rows, tokens sent to one rank "
            f"{copies[0]:.0f} -> {copies[1]:.0f}, {ms[0]:.4g} -> {ms[1]:.4g} ms a step by the cost model"
        )
        before, after = (list(hot) for hot in hots)
        told = f"experts {_listed(after)} are shadowed" if after else "no expert is shadowed any more"
        told += f" (before: {_listed(before)})" if before and after else ""
        data = {"what": "shadows", "layer": layer, "experts": after, "before": before, "busiest": each, "ms": ms}
        return Action(f"layer {layer}: {told}: {why}", data | {"copies": copies, "why": why})


def _measured(rates: Rates) -> Action:
    us = {name: 1e6 * getattr(rates, name) for name in ("row", "copy", "loan")}
    message = (
        f"measured, forward and backward: {us['row']:.4g} us for a row of an expert, {us['copy']:.4g} us for a token "
        f"sent to another rank and back, {us['loan']:.5g} us for an expert lent to {rates.ep_size} ranks"
    )
    return Action(message, {"what": "rates", **asdict(rates)})


def _listed(experts: list[int]) -> str:
    return ", ".join(map(str, experts))
