"""Routings that nobody wishes for, one after the other through one layer: never a hang, nothing lost, zero gradients
where there is nothing to learn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from moetrain.moe.layer import MoELayer
from moetrain.moe.replay import Replay
from moetrain.parallel.mesh import mesh_of_world
from moetrain.types import RouterInput, Routing
from tests.forced import forced
from tests.ranks import run_ranks
from tests.tiny import ids, moe_layer, tiny

NUM_STEPS = 500
NUM_EXPERTS, TOKENS = 8, 6
CPU = torch.device("cpu")
DISPATCHERS = [("alltoall", None), ("alltoall", 1.0), ("dedup", None), ("hierarchical", None), ("padded", 1.0)]


class Dictated(torch.nn.Module):
    """Routes each token to the given experts; what is not valid is no assignment."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.expert_TK = self.valid_TK = torch.zeros(0)
        self.adapts = False

    def forward(self, given: RouterInput, replay: Replay) -> Routing:
        routing = forced(self.inner, given, replay, self.expert_TK)
        return replace(routing, weight_TK=routing.weight_TK * self.valid_TK, valid_TK=self.valid_TK)


def routings(rank: int, world: int) -> Iterator[tuple[Tensor, Tensor]]:
    """expert_TK and valid_TK of each step, other ones on each rank; the number of tokens changes too, down to none."""
    draw = np.random.default_rng(rank)
    both, each = np.random.default_rng(99), NUM_EXPERTS // world
    for step in range(NUM_STEPS):
        kind = both.integers(8)
        num_tokens = 0 if kind == 7 and step % world == rank else TOKENS
        first = np.full(num_tokens, step % NUM_EXPERTS)  # 0: all to one expert, another one at each step
        if kind == 1:  # all to the experts of one rank
            first = step % world * each + draw.integers(each, size=num_tokens)
        elif kind == 2:  # by Zipf's law
            first = np.minimum(draw.zipf(1.5, num_tokens), NUM_EXPERTS) - 1
        elif kind == 3:  # each token to another one
            first = (np.arange(num_tokens) + step + rank) % NUM_EXPERTS
        elif kind >= 4:
            first = draw.integers(NUM_EXPERTS, size=num_tokens)
        second = (first + draw.integers(1, NUM_EXPERTS, size=num_tokens)) % NUM_EXPERTS
        expert_TK = torch.from_numpy(np.stack([first, second], 1))
        valid_TK = torch.ones(num_tokens, 2, dtype=torch.bool)
        if kind == 4 or (kind == 5 and step % world == rank):  # nobody gets anything; this rank sends nothing
            valid_TK[:] = False
        elif kind == 6:
            valid_TK = torch.from_numpy(draw.random((num_tokens, 2)) < 0.5)
        yield expert_TK, valid_TK


def one_step(layer: MoELayer, expert_TK: Tensor, valid_TK: Tensor) -> tuple[int, int, int]:
    """Forward and backward. Assignments sent, assignments counted before and after dropping."""
    layer.router.expert_TK, layer.router.valid_TK = expert_TK, valid_TK
    x_TD = torch.randn(expert_TK.shape[0], 16, requires_grad=True)
    layer.zero_grad(set_to_none=True)
    out = layer(x_TD, ids(x_TD, 1), Replay())
    (out.hidden_TD.square().sum() + out.losses.balance + out.losses.z).backward()
    layer.commit()
    taken_2E = layer.load.take()
    for name, param in [*layer.named_parameters(), ("x_TD", x_TD)]:
        assert param.grad is not None, name
        assert param.grad.isfinite().all(), name
    assert out.hidden_TD.shape == x_TD.shape
    return int(valid_TK.sum()), int(taken_2E[0].sum()), int(taken_2E[1].sum())


def soak(rank: int, world: int) -> dict[str, list[tuple[int, int, int, float, int]]]:
    """Of each dispatcher and step: what ``one_step`` gives, the size of this rank's expert gradients, rows received."""
    mesh, found = mesh_of_world(world, CPU), {}
    for dispatch, factor in DISPATCHERS:
        layer = moe_layer(tiny(dispatch=dispatch, capacity__factor_train=factor, capacity__factor_eval=factor), mesh)
        layer.router = Dictated(layer.router)
        steps = found[f"{dispatch} {factor}"] = []
        for expert_TK, valid_TK in routings(rank, world):
            numbers = one_step(layer, expert_TK, valid_TK)
            gradient = sum(float(p.grad.abs().sum()) for p in layer.experts.parameters())
            steps.append((*numbers, gradient, int(layer.gauges.take().received)))
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_adversarial_routings_never_hang_and_lose_nothing(world: int) -> None:
    by_rank = run_ranks(world, soak)
    for name in by_rank[0]:
        numbers = np.array([rank[name] for rank in by_rank])
        assert numbers.shape == (world, NUM_STEPS, 5)
        sent, assigned, kept, gradient, received = numbers.transpose(2, 0, 1)
        assert (assigned == sent).all()
        assert (kept <= assigned).all()
        nothing = kept.sum(0) == 0
        assert NUM_STEPS / 25 < nothing.sum() < NUM_STEPS / 2
        assert (gradient[:, nothing] == 0).all()
        assert (gradient[:, ~nothing].sum(0) > 0).all()
        if name.endswith("None"):
            assert (kept == assigned).all()
        if name.startswith("alltoall"):
            assert (received.sum(0) == kept.sum(0)).all()
