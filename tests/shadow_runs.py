"""A layer on several ranks whose routing is dictated, with experts shadowed and without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moetrain.moe.replay import Replay
from moetrain.parallel.mesh import Mesh, mesh_of_world
from tests.ranks import run_ranks
from tests.test_dispatch import TOKENS, ForcedCapacity, ForcedRouter, chosen
from tests.tiny import ROUTER, ids, moe_layer, tiny

CPU = torch.device("cpu")
Found = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """changes: of the tiny config; dtype: of weights and tokens."""

    routing: str
    hot: tuple[int, ...]
    changes: tuple[tuple[str, Any], ...] = ()
    dtype: torch.dtype = torch.float32


def layer_results(mesh: Mesh, case: Case, hot: tuple[int, ...]) -> Found:
    """Output, all gradients, and what was counted of one forward and backward."""
    config = tiny(**{"dispatch": "dedup", "experts__num_shared": 1, **dict(case.changes)})
    layer = moe_layer(config, mesh).to(case.dtype)
    kept_TK = torch.full((TOKENS, 2), case.routing != "nothing_kept" and (case.routing, mesh.rank) != ("one_silent", 1))
    layer.router = ForcedRouter(layer.router, chosen(case.routing, mesh.rank))
    layer.capacity = ForcedCapacity(layer.capacity, kept_TK)
    layer.shadows.put(hot)
    x_TD = torch.randn(TOKENS, 16, generator=torch.Generator().manual_seed(mesh.rank)).to(case.dtype).requires_grad_()
    out = layer(x_TD, ids(x_TD, 2), Replay())
    (out.hidden_TD.float().square().sum() + out.losses.balance + out.losses.z).backward()
    layer.load.commit()
    layer.gauges.commit()
    gauges, grads = layer.gauges.take(), {name: p.grad for name, p in layer.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    found = {"y": out.hidden_TD.detach(), "dx": x_TD.grad, **grads}
    counted = {"load": layer.load.take(), "rows": gauges.received, "copies": gauges.travelled}
    return {name: value.float().numpy() for name, value in (found | counted).items() if value is not None}


def both(rank: int, world: int, cases: list[Case]) -> list[tuple[Found, Found]]:
    """Without shadows, and with them."""
    mesh = mesh_of_world(world, CPU)
    return [(layer_results(mesh, case, ()), layer_results(mesh, case, case.hot)) for case in cases]


def on_ranks(world: int, cases: list[Case]) -> list[list[tuple[Found, Found]]]:
    """For each case the results of all ranks."""
    return [list(of_ranks) for of_ranks in zip(*run_ranks(world, both, cases), strict=True)]


GPT_OSS = (("experts__activation", "gpt_oss"), ("experts__bias", True))
ON_INPUT = (("router", {**ROUTER, "score": "sigmoid", "weights": "scores", "weight_on": "input"}),)
CASES = [
    Case("random", (3,)),
    Case("random", (0, 2, 7)),
    Case("random", tuple(range(8))),
    Case("random", (1, 6), (("dispatch", "alltoall"), ("capacity__factor_train", 1.0))),
    Case("random", (0, 5), GPT_OSS),
    Case("random", (0, 5), ON_INPUT),
    Case("random", (2, 3), (("dispatch__chunks", 2),)),
    Case("all_to_one", (2, 3)),
    Case("all_to_one", (3, 4)),
    Case("all_to_one", (0,)),
    Case("nothing_kept", (1, 3)),
    Case("one_silent", (3,)),
    Case("random", (0, 2, 7), (), torch.bfloat16),
]
