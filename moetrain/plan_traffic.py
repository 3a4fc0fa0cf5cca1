"""Bytes that a rank sends to others in the experts' all-to-all, at an even load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetrain.checks import traits_of
from moetrain.config import Config
from moetrain.parallel.wire import BLOCK
from moetrain.plan_memory import value_bytes
from moetrain.rules.layout import DEDUP, HIERARCHICAL, ranks_of_node


def exchange_bytes(config: Config, ep_size: int, tokens: float) -> int:
    """Of ``tokens`` tokens of this rank that pass an MoE layer: out, home, and their gradients."""
    top_k = traits_of(config).experts_per_token
    return round(tokens * config.model.dim * rows_sent(config.dispatch, ep_size, top_k) * _bytes_of_ways(config))


def rows_sent(dispatch: Mapping[str, Any], ep_size: int, top_k: float) -> float:
    """Rows that leave a rank for each of its tokens, one way: one for each expert elsewhere, or for each rank, or for
    each node and then for each rank of it.
    """
    if dispatch["_target_"] not in (DEDUP, HIERARCHICAL):
        return top_k * (ep_size - 1) / ep_size
    per_node = ranks_of_node(dispatch.get("ranks_per_node")) if dispatch["_target_"] == HIERARCHICAL else 1
    if per_node >= ep_size:
        per_node = 1
    num_nodes = ep_size // per_node
    return (num_nodes - 1) * _reached(num_nodes, top_k) + num_nodes * (per_node - 1) * _reached(ep_size, top_k)


def _reached(places: int, top_k: float) -> float:
    """The chance that a token has any of its experts at one of ``places`` places."""
    return 1.0 - (1.0 - 1.0 / places) ** top_k


def _bytes_of_ways(config: Config) -> float:
    """Of a number, on the four ways together."""
    ways = {"bf16": 8.0, "fp8": 1.0 + 4.0 / BLOCK + 6.0}
    return ways.get(config.dispatch.get("payload", "exact"), 4.0 * value_bytes(config))
