"""Every router under every EP size, with recompute, and through an optimiser step, gives what it gives alone."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from moetrain.engine import make_engine
from moetrain.models.decoder import Decoder
from moetrain.moe.replay import Replay
from moetrain.parallel.mesh import Mesh, mesh_of_world
from tests.catalog import ROUTERS, tiny_with
from tests.ranks import run_ranks
from tests.tiny import VOCAB, alone, ids, moe_layer, part_of, tokens

CPU = torch.device("cpu")
TOKENS, WORLD = 16, 4


def run_layer(name: str, mesh: Mesh, rank: int, dispatch: str, factor: float | None) -> dict[str, np.ndarray]:
    """Forward and backward of one layer on the tokens of ``rank``."""
    layer = moe_layer(tiny_with(name, dispatch=dispatch, capacity__factor_train=factor, capacity__minimum=2), mesh)
    generator = torch.Generator().manual_seed(rank)
    x_TD = (torch.randn(TOKENS, 16, generator=generator) + 0.1).requires_grad_()
    torch.manual_seed(rank)
    out = layer(x_TD, ids(x_TD, 2), Replay())
    (out.hidden_TD.square().sum() + out.losses.balance + out.losses.own).backward()
    assert x_TD.grad is not None
    found = {"y": out.hidden_TD.detach(), "dx": x_TD.grad}
    return {k: v.numpy() for k, v in (found | {n: p.grad for n, p in layer.named_parameters()}).items()}


def sharded(rank: int, world: int, cases: list[Any]) -> list[dict[str, np.ndarray]]:
    meshes = {size: mesh_of_world(size, CPU) for size in (1, 2, 4)}
    return [run_layer(name, meshes[ep], rank, dispatch, factor) for name, ep, dispatch, factor in cases]


def test_every_router_gives_the_same_under_every_ep_size() -> None:
    """Each rank routes its own tokens; wherever the experts are, output and gradients are those of all in one place."""
    layouts = ((1, "alltoall", None), (2, "padded", 1.0), (4, "dedup", None), (4, "hierarchical", None))
    cases = [(name, *layout) for name in ROUTERS for layout in layouts]
    by_rank = run_ranks(WORLD, sharded, cases)
    reference = {(n, f): [run_layer(n, alone(), r, "local", f) for r in range(WORLD)] for n, _, _, f in cases}
    for number, (name, ep, dispatch, factor) in enumerate(cases):
        ours, plain = [results[number] for results in by_rank], reference[name, factor]
        label = f"{name} ep {ep} {dispatch} {factor}"
        for rank in range(WORLD):
            for key in ours[rank].keys() - {"experts.gate_up", "experts.down"}:
                np.testing.assert_allclose(
                    ours[rank][key], plain[rank][key], rtol=1e-4, atol=1e-5, err_msg=f"{label} {key}"
                )
        for key in ("experts.gate_up", "experts.down"):
            for first in range(0, WORLD, ep):
                held = np.concatenate([ours[first + i][key] for i in range(ep)])
                total: Any = sum(plain[first + i][key] for i in range(ep))
                np.testing.assert_allclose(held, total, rtol=1e-4, atol=1e-4, err_msg=f"{label} {key}")


def train(name: str, mesh: Mesh, recompute: bool, steps: int = 2, accumulation: int = 1) -> dict[str, np.ndarray]:
    """A few steps of the tiny decoder, of four sequences a rank: weights and buffers at the end."""
    size = 4 // accumulation
    config = tiny_with(
        name,
        engine__ep_size=mesh.ep_size,
        engine__recompute=recompute,
        train__micro_batch=size,
        train__global_batch=4 * mesh.world_size,
        optim__clip_norm=1.0,
    )
    torch.manual_seed(mesh.rank)
    model = Decoder(config, mesh, VOCAB)
    engine = make_engine(config, model, mesh, accumulation)
    for step in range(steps):
        whole = tokens(4 * mesh.world_size, 16, seed=step)
        for first in range(4 * mesh.rank, 4 * mesh.rank + 4, size):
            engine.forward_backward(part_of(whole, first, first + size))
            model.commit_load()
        engine.step(0.5)
        model.adapt_routers(moved=True)
        model.take_load()
    return {piece.key: piece.values_X.numpy() for piece in engine.state().held}


@pytest.mark.parametrize("name", ROUTERS)
def test_recompute_changes_nothing(name: str) -> None:
    """Noise, choices, statistics and counts: recompute runs forward twice, and nothing may be counted twice."""
    plain, again = train(name, alone(), recompute=False), train(name, alone(), recompute=True)
    assert plain.keys() == again.keys()
    for key, value in plain.items():
        np.testing.assert_allclose(again[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", ["deepseek_v3", "longcat", "remoe"])
def test_trap4_accumulation_changes_nothing(name: str) -> None:
    """Buffers move once per optimiser step, by all of its micro-batches: a bias that moves by the sign of its load
    does so once, and exactly as far.
    """
    whole, halves = train(name, alone(), recompute=False), train(name, alone(), recompute=False, accumulation=2)
    assert any(key.startswith("buffer") for key in whole)
    for key, value in whole.items():
        if name == "deepseek_v3" and key.endswith("bias_E"):
            assert value.any()
            np.testing.assert_array_equal(halves[key], value, err_msg=key)
        np.testing.assert_allclose(halves[key], value, rtol=1e-4, atol=1e-5, err_msg=key)


def odd(rank: int, world: int, names: list[str]) -> list[str]:
    """No tokens, and tokens that are all alike, with every dispatcher; what is wrong, in words."""
    mesh, wrong = mesh_of_world(2, CPU), []
    for name, dispatch, num_tokens in product(names, ("alltoall", "dedup", "padded"), (0, 4)):
        factor = 1.0 if dispatch == "padded" else None
        layer = moe_layer(tiny_with(name, dispatch=dispatch, capacity__factor_train=factor), mesh)
        x_TD = torch.ones(num_tokens, 16, requires_grad=True)
        out = layer(x_TD, torch.zeros(2, num_tokens // 2, dtype=torch.int64), Replay())
        (out.hidden_TD.sum() + sum(out.losses.named().values())).backward()
        gradients = {key: parameter.grad for key, parameter in layer.named_parameters()}
        bad = [key for key, grad in gradients.items() if grad is None or not torch.isfinite(grad).all()]
        bad += [] if torch.isfinite(out.hidden_TD).all() else ["output"]
        wrong += [f"{name} {dispatch} {num_tokens}: {key}" for key in bad]
    return wrong


def test_no_tokens_and_tokens_that_are_all_alike_under_expert_parallelism() -> None:
    assert run_ranks(2, odd, ROUTERS) == [[], []]


def trained(rank: int, world: int, names: list[str]) -> list[list[dict[str, np.ndarray]]]:
    meshes = [mesh_of_world(size, CPU) for size in (1, 2)]
    return [[train(name, mesh, recompute=False) for mesh in meshes] for name in names]


def test_buffers_are_alike_on_all_ranks_and_at_every_ep_size() -> None:
    """What routers learn outside of the gradient comes from global sums: no rank has a view of its own."""
    ranks = run_ranks(2, trained, ROUTERS)
    moved = 0
    for number, name in enumerate(ROUTERS):
        first = ranks[0][number]
        for key in [key for key in first[0] if key.startswith("buffer")]:
            moved += 1
            for layout in (0, 1):
                mine, yours = (results[number][layout][key] for results in ranks)
                np.testing.assert_array_equal(yours, mine, err_msg=f"{name} {key}")
            np.testing.assert_allclose(first[1][key], first[0][key], rtol=1e-4, atol=1e-6, err_msg=f"{name} {key}")
    assert moved >= 4
