"""What a layer's load costs where some experts are shadowed, and which experts had better be.

A shadowed expert is lent to every rank of its EP group for each forward and backward (``parallel/share.py``): its
tokens stay where they are, so that its rows are shared out evenly, and its weights travel instead. All ranks wait for
the busiest one, so that a layer takes, forward and backward::

    most rows computed by a rank * s a row + most copies taken in by a rank * s a copy + loans * s a loan

FasterMoE (He et al., PPoPP 2022) decides by such a model too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetrain.checks import traits_of
from moetrain.config import Config
from moetrain.rules.layout import ALLTOALL

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Rates:
    """Seconds, forward and backward together, on the slowest rank.

    row: for a row of an expert. copy: for a token that another rank sends and gets back, and its gradients. loan: for
    an expert that is lent by one rank to its EP group of ``ep_size``.
    """

    row: float
    copy: float
    loan: float
    ep_size: int


@dataclass(frozen=True)
class Load:
    """What an EP group does for one layer in a micro-batch.

    rows_E: of each expert. per_token: experts of a token. merged: a token is sent once to a rank, whatever number of
    experts it has there.
    """

    rows_E: Array
    per_token: float
    merged: bool


def load_of(config: Config, rows_E: Array) -> Load:
    """Those rows, under the router and the dispatcher of ``config``."""
    return Load(rows_E, traits_of(config).experts_per_token, config.dispatch["_target_"] != ALLTOALL)


@dataclass(frozen=True)
class Cost:
    """Of a micro-batch. rows: computed by the busiest rank; copies: taken in from others by the one that gets most."""

    seconds: float
    rows: float
    copies: float


def cost(load: Load, hot: tuple[int, ...], rates: Rates) -> Cost:
    """If the experts ``hot`` are shadowed. Tokens are taken to be spread evenly over the ranks that they come from."""
    cold_G = _cold(load, hot).reshape(rates.ep_size, -1).sum(1)
    rows = cold_G.max() + load.rows_E[list(hot)].sum() / rates.ep_size
    copies_G = cold_G
    if load.merged:
        num_tokens = max(load.rows_E.sum() / load.per_token, 1.0)
        share_G = np.minimum(cold_G / (num_tokens * load.per_token), 1.0)
        copies_G = num_tokens * (1.0 - (1.0 - share_G) ** load.per_token)
    copies = copies_G.max() * (rates.ep_size - 1) / rates.ep_size
    seconds = rows * rates.row + copies * rates.copy + len(hot) * rates.loan
    return Cost(float(seconds), float(rows), float(copies))


def cheapest(load: Load, most: int, rates: Rates) -> tuple[int, ...]:
    """At most ``most`` experts, ascending, with which the layer takes least: of the sets that come about if the busiest
    rank's hottest expert is shadowed, and then again; fewer where that is no slower. Ties go to the lower id.
    """
    hot: tuple[int, ...] = ()
    best, least = hot, cost(load, hot, rates).seconds
    for _ in range(most):
        cold_Ge = _cold(load, hot).reshape(rates.ep_size, -1)
        rank = int(cold_Ge.sum(1).argmax())
        if not cold_Ge[rank].any():
            break
        hot = tuple(sorted((*hot, rank * cold_Ge.shape[1] + int(cold_Ge[rank].argmax()))))
        if (seconds := cost(load, hot, rates).seconds) < least:
            best, least = hot, seconds
    return best


def _cold(load: Load, hot: tuple[int, ...]) -> Array:
    """Rows of the experts that stay at home, 0 for the others, [E]."""
    cold_E = load.rows_E.astype(np.float64)
    cold_E[list(hot)] = 0.0
    return cold_E
