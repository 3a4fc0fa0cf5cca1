"""A model small enough to differentiate in milliseconds, and data for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from omegaconf import OmegaConf
from pydantic import TypeAdapter
from torch import Tensor

from moetrain.compose import conf_folder
from moetrain.config import Config
from moetrain.moe.dispatch.base import Dispatcher
from moetrain.moe.journey import Travelled, set_out, travel
from moetrain.moe.layer import MoELayer
from moetrain.ops.init import Draw
from moetrain.ops.kernels import make_kernels
from moetrain.ops.timeline import Timeline
from moetrain.parallel.mesh import Mesh
from moetrain.parts import parameters
from moetrain.types import Batch, Dispatched, Placement, RouterInput, RouterSite

VOCAB = 64
ROUTER = {
    "_target_": "moetrain.moe.routers.token_choice.TokenChoiceRouter",
    "top_k": 2,
    "select": "logits",
    "weights": "chosen_softmax",
}


def tiny(**changes: Any) -> Config:
    """A two-layer config; changes are dotted keys, ``__`` for the dot: ``tiny(model__dim=32, dispatch="local")``;
    ``router`` is a whole part.
    """
    raw: dict[str, Any] = {
        "run": {"seed": 7},
        "model": {
            "dim": 16,
            "num_layers": 2,
            "num_heads": 2,
            "num_kv_heads": 1,
            "head_dim": 8,
            "ffn_dim": 32,
            "expert_dim": 24,
            "context": 16,
            "init_std": 0.1,
        },
        "experts": {"num_experts": 8},
        "router": changes.pop("router", dict(ROUTER)),
        "capacity": {"factor_train": None, "factor_eval": None},
        "dispatch": dict(_dispatcher(changes.pop("dispatch", "alltoall"))),
        "balance": {"balance_coef": 0.1, "z_coef": 0.01, "scope": "sequence"},
        "control": {},
        "engine": {"name": "local", "zero_stage": 0, "dtype": "fp32"},
        "optim": {"name": "sgd", "lr": 0.1, "weight_decay": 0.0, "clip_norm": 0.05},
        "data": {},
        "train": {"steps": 3, "global_batch": 8, "micro_batch": 2},
        "monitor": {},
        "health": {},
        "machine": {"device": "cpu"},
        "debug": {},
        "recipe": {},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        raw[section][name] = value
    return TypeAdapter(Config).validate_json(json.dumps(raw), strict=True)


def alone() -> Mesh:
    """One process."""
    return Mesh(rank=0, world_size=1, ep_size=1, device=torch.device("cpu"))


def moe_layer(config: Config, mesh: Mesh | None = None) -> MoELayer:
    """An MoE layer with weights, by torch's own kernels."""
    mesh = mesh or alone()
    timeline, kernels = Timeline(mesh.device, enabled=False), make_kernels(mesh.device, "torch")
    layer = MoELayer(config, mesh, timeline, kernels, VOCAB, 0)
    layer.init_weights(Draw(1), 0.2, 0.2)
    return layer


def site(dim: int = 6, num_experts: int = 5) -> RouterSite:
    """Where a router under test stands."""
    return RouterSite(dim, num_experts, VOCAB, 0, torch.device("cpu"))


def complete(kind: type, **own: Any) -> dict[str, Any]:
    """A router's parameters with the defaults of its signature, as its ``traits`` and ``problems`` get them."""
    return parameters(kind, own, ("site",))


def seen(x_TD: Tensor, num_sequences: int = 1) -> RouterInput:
    """A router's input of tokens whose ids do not matter."""
    return RouterInput(x_TD, ids(x_TD, num_sequences))


def ids(x_TD: Tensor, num_sequences: int = 1) -> Tensor:
    """Token ids for rows that no embedding made, int64 [num_sequences, T / num_sequences]."""
    return (torch.arange(x_TD.shape[0]) % VOCAB).view(num_sequences, -1)


def tokens(num_sequences: int, context: int, seed: int = 0) -> Batch:
    """A batch of random tokens, the same for every caller."""
    generator = torch.Generator().manual_seed(seed)
    window = torch.randint(0, VOCAB, (num_sequences, context + 1), generator=generator)
    return Batch(window[:, :-1], window[:, 1:])


def there_and_back(
    dispatcher: Dispatcher, x_TD: Tensor, placement: Placement, experts: Callable[[Dispatched], Tensor]
) -> Travelled:
    """A round trip with nothing done aside."""
    return travel(set_out(dispatcher, x_TD, placement), experts, lambda: None)


def part_of(batch: Batch, start: int, stop: int) -> Batch:
    """Sequences start..stop of a batch."""
    return Batch(batch.tokens_BS[start:stop], batch.targets_BS[start:stop])


@cache
def _dispatcher(name: str) -> dict[str, Any]:
    """Four ranks are two nodes, for whom it makes a difference."""
    part = OmegaConf.load(conf_folder() / "dispatch" / f"{name}.yaml")
    return {"_target_": part["_target_"], **({"ranks_per_node": 2} if "ranks_per_node" in part else {})}
