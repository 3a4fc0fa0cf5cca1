"""What a diagnosis is made from: numbers of metrics.jsonl as tables, and a few facts of the configuration."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moetrain.checks import CONTEXT, traits_of
from moetrain.config import Config
from moetrain.models.block import is_moe_layer
from moetrain.moe.units import in_our_units
from moetrain.monitor.history import Series
from moetrain.monitor.jsonl import STEP
from moetrain.parts import TARGET, parameters, resolve

Array = NDArray[np.float64]
LAYER = re.compile(r"moe/layer_(\d+)/load_max")
WINDOW = "balance/load_max"  # a row that has it is that of a training window
MOVING = ("sign", "proportional", "quantile")


@dataclass(frozen=True)
class Facts:
    """What must be known of the run. experts_per_token: the expected number where it is ragged.

    balance_coef: in our units. more_balance: what to do in this run to even its load. has_bias: the router moves a bias
    by the load. dropless: in training.
    """

    num_experts: int
    experts_per_token: float
    balance_coef: float
    more_balance: str
    has_bias: bool
    dropless: bool
    ep_size: int
    warmup_steps: int


@dataclass(frozen=True)
class Signs:
    """N windows, oldest first. steps_N: the step that each ends with. Numbers by their names without the prefix."""

    facts: Facts
    steps_N: NDArray[np.int64]
    layers: tuple[int, ...]
    whole: Mapping[str, Array]
    by_layer: Mapping[str, Array]

    def of(self, name: str) -> Array:
        """balance/<name> of each window, [N]; NaN where a window has it not."""
        return self.whole.get(name, np.full(len(self.steps_N), np.nan))

    def at(self, name: str) -> Array:
        """moe/layer_.../<name> of each window and layer, [N, L]; NaN likewise."""
        return self.by_layer.get(name, np.full((len(self.steps_N), len(self.layers)), np.nan))

    def part(self, start: int, stop: int) -> Signs:
        """Windows start..stop."""
        return replace(
            self,
            steps_N=self.steps_N[start:stop],
            whole={name: values_N[start:stop] for name, values_N in self.whole.items()},
            by_layer={name: values_NL[start:stop] for name, values_NL in self.by_layer.items()},
        )


def signs_of(rows: Sequence[Mapping[str, float]], names: Sequence[str], facts: Facts) -> Signs:
    """The tables of ``names``, of rows as in metrics.jsonl; rows of validation, or of a dense model, say nothing."""
    rows = [row for row in rows if WINDOW in row]
    steps_N = np.array([row[STEP] for row in rows], dtype=np.int64)

    def column(key: str) -> Array:
        return np.array([row.get(key, np.nan) for row in rows], dtype=np.float64)

    return _signs(rows[-1] if rows else (), steps_N, column, names, facts)


def signs_of_series(series: Mapping[str, Series], names: Sequence[str], facts: Facts) -> Signs:
    """The same from the metrics of a run that is read back."""
    steps_N = series[WINDOW].steps_N if WINDOW in series else np.zeros(0, dtype=np.int64)

    def column(key: str) -> Array:
        values_N = np.full(len(steps_N), np.nan)
        if key in series:
            _, ours, theirs = np.intersect1d(steps_N, series[key].steps_N, return_indices=True)
            values_N[ours] = series[key].values_N[theirs]
        return values_N

    return _signs(series, steps_N, column, names, facts)


def _signs(
    keys: Iterable[str], steps_N: NDArray[np.int64], column: Callable[[str], Array], names: Sequence[str], facts: Facts
) -> Signs:
    layers = sorted(int(found.group(1)) for key in keys if (found := LAYER.fullmatch(key)))
    whole = {name: column(f"balance/{name}") for name in names}
    by_layer = {}
    for name in names:
        columns = [column(f"moe/layer_{layer:02d}/{name}") for layer in layers]
        by_layer[name] = np.stack(columns, axis=1) if columns else np.zeros((len(steps_N), 0))
    return Signs(facts, steps_N, tuple(layers), whole, by_layer)


def facts_of(config: Config, ep_size: int) -> Facts:
    """Of a checked config. ep_size: the number of ranks that share the experts of a layer in this run."""
    num_experts = config.experts.num_experts
    top_k = traits_of(config).experts_per_token
    num_moe_layers = sum(is_moe_layer(config.model, i) for i in range(config.model.num_layers))
    ours = in_our_units(config.balance, top_k=top_k, num_experts=num_experts, num_moe_layers=num_moe_layers)
    capacity = config.capacity
    return Facts(
        num_experts=num_experts,
        experts_per_token=top_k,
        balance_coef=ours.balance_coef,
        more_balance=_more_balance(config),
        has_bias=_own(config).get("bias") in MOVING,
        dropless=capacity.factor_train is None and capacity.slots_train is None,
        ep_size=ep_size,
        warmup_steps=config.optim.warmup_steps,
    )


def _more_balance(config: Config) -> str:
    own, balance = _own(config), config.balance
    if traits_of(config).needs_tokens:
        return "choose another router: by token ids it can not learn to be even"
    if own.get("bias") in MOVING:
        return f"raise router.bias_rate (now {own['bias_rate']:g})"
    if coefs := [f"router.{name} (now {value:g})" for name, value in own.items() if name.endswith("_coef")]:
        return f"raise {' or '.join(coefs)}"
    if config.control.target_max_vio is not None:
        target, most = config.control.target_max_vio, config.control.aux_max
        return f"lower control.target_max_vio (now {target:g}) or raise control.aux_max (now {most:g})"
    if balance.balance_coef > 0:
        return f"raise balance.balance_coef (now {balance.balance_coef:g})"
    return "switch a balance loss on (balance=default)"


def _own(config: Config) -> Mapping[str, object]:
    """The router's settings, defaults included."""
    part = config.router
    return parameters(resolve(part[TARGET], config.machine.allow_modules), part, CONTEXT["router"])
