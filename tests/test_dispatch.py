"""Each dispatcher equals the single-process reference, forward and in every gradient, whatever the routing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moetrain.bench.race import Contestant, bytes_sent
from moetrain.compose import options
from moetrain.moe.replay import Replay
from moetrain.parallel.mesh import Mesh, mesh_of_world
from moetrain.types import Placement, RouterInput, Routing
from tests.forced import forced
from tests.ranks import run_ranks
from tests.test_layer_gates import host_waits, layer_of
from tests.tiny import ROUTER, alone, ids, moe_layer, seen, there_and_back, tiny

TOKENS = 24
ROUTINGS = ["random", "all_to_one", "all_to_last_rank", "one_rank_silent", "nothing_kept"]
CPU = torch.device("cpu")
SHARDED = [name for name in options("dispatch") if name != "local"]
DROPLESS = [name for name in SHARDED if name != "padded"]
Case = tuple[str, str, float | None, int]
"""Dispatcher, kind of routing, capacity factor, chunks."""


def chosen(kind: str, rank: int) -> torch.Tensor:
    """expert_TK of 8 experts, the same on every rank unless ``kind`` says otherwise."""
    generator = torch.Generator().manual_seed(100 + rank)
    if kind == "all_to_one":
        return torch.tensor([[3, 2]]).expand(TOKENS, 2).contiguous()
    if kind == "all_to_last_rank":
        return torch.rand(TOKENS, 2, generator=generator).topk(2).indices + 6
    return torch.rand(TOKENS, 8, generator=generator).topk(2).indices


class ForcedRouter(torch.nn.Module):
    """A router whose choice is given, so that the routings that hurt can be had."""

    def __init__(self, inner: torch.nn.Module, expert_TK: torch.Tensor) -> None:
        super().__init__()
        self.inner, self.expert_TK = inner, expert_TK

    def forward(self, given: RouterInput, replay: Replay) -> Routing:
        return forced(self.inner, given, replay, self.expert_TK)


class ForcedCapacity(torch.nn.Module):
    """Drops what it is told to drop, on top of what the real capacity drops."""

    def __init__(self, inner: torch.nn.Module, kept_TK: torch.Tensor) -> None:
        super().__init__()
        self.inner, self.kept_TK = inner, kept_TK

    def forward(self, routing: Routing, num_sequences: int, replay: Replay) -> Placement:
        placement = self.inner(routing, num_sequences, replay)
        return replace(placement, kept_TK=placement.kept_TK & self.kept_TK)


def run_layer(mesh: Mesh, case: Case, rank: int) -> dict[str, np.ndarray]:
    """Forward and backward of one layer on the tokens of ``rank``: output and all gradients."""
    dispatch, kind, factor, chunks = case
    travels = {} if dispatch == "local" else {"dispatch__chunks": chunks}
    config = tiny(
        dispatch=dispatch, capacity__factor_train=factor, capacity__minimum=2, experts__num_shared=1, **travels
    )
    layer = moe_layer(config, mesh)
    num_tokens = 0 if kind == "one_rank_empty" and rank == 1 else TOKENS
    kept_TK = torch.full((num_tokens, 2), kind != "nothing_kept" and not (kind == "one_rank_silent" and rank == 1))
    layer.router = ForcedRouter(layer.router, chosen(kind, rank)[:num_tokens])
    layer.capacity = ForcedCapacity(layer.capacity, kept_TK)
    x_TD = torch.randn(num_tokens, 16, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    out = layer(x_TD, ids(x_TD, 2), Replay())
    (out.hidden_TD.square().sum() + out.losses.balance + out.losses.z).backward()
    assert x_TD.grad is not None
    found = {"y": out.hidden_TD.detach(), "dx": x_TD.grad, "balance": out.losses.balance.detach()}
    for name, p in layer.named_parameters():
        assert p.grad is not None, f"{name} took no part in backward"
        found[name] = p.grad
    return {k: v.numpy() for k, v in found.items()}


def sharded(rank: int, world: int, cases: list[Case]) -> list[dict[str, np.ndarray]]:
    mesh = mesh_of_world(world, CPU)
    results = []
    for case in cases:
        dist.barrier()
        results.append(run_layer(mesh, case, rank))
    return results


def cases() -> list[Case]:
    """Every sharded dispatcher, with and without a capacity; the padded one can't do without. Besides, several chunks
    where a rank has no tokens: it takes part in all of them.
    """
    dropless: list[Case] = [(d, k, None, 1) for d in DROPLESS for k in ROUTINGS]
    limited: list[Case] = [(d, k, 1.0, 1) for d in SHARDED for k in ROUTINGS]
    return [*dropless, *limited, *((d, "one_rank_empty", None, 3) for d in DROPLESS)]


@pytest.mark.parametrize("world", [2, 4])
def test_every_dispatcher_equals_one_process(world: int) -> None:
    """TRAPS 14, 27, 34 and T15: values, gradients of inputs, router, experts; no rank may hang or skip a node."""
    by_rank = run_ranks(world, sharded, cases())
    for number, (dispatch, kind, factor, _) in enumerate(cases()):
        alone_by_rank = [run_layer(alone(), ("local", kind, factor, 1), rank) for rank in range(world)]
        label = f"{dispatch} {kind} capacity {factor}"
        for rank in range(world):
            ours, reference = by_rank[rank][number], alone_by_rank[rank]
            for name in ("y", "dx", "balance", "router.inner.gate", "shared.gate_up", "shared.down"):
                np.testing.assert_allclose(ours[name], reference[name], rtol=1e-5, atol=1e-5, err_msg=f"{label} {name}")
        for name in ("experts.gate_up", "experts.down"):
            held = np.concatenate([by_rank[rank][number][name] for rank in range(world)])
            total: Any = sum(reference[name] for reference in alone_by_rank)
            np.testing.assert_allclose(held, total, rtol=1e-5, atol=1e-4, err_msg=f"{label} {name}")


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("dispatch", SHARDED)
def test_one_rank_of_its_own_equals_local(dispatch: str, kind: str) -> None:
    ours = run_layer(alone(), (dispatch, kind, 1.0, 1), 0)
    reference = run_layer(alone(), ("local", kind, 1.0, 1), 0)
    for name, value in reference.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_dropped_token_passes_by_unchanged() -> None:
    config = tiny(dispatch="padded", capacity__factor_train=1.0)
    layer = moe_layer(config, alone())
    kept_TK = torch.ones(TOKENS, 2, dtype=torch.bool)
    kept_TK[5] = False
    layer.capacity = ForcedCapacity(layer.capacity, kept_TK)
    x_TD = torch.randn(TOKENS, 16)
    out = layer(x_TD, ids(x_TD, 2), Replay())
    assert (out.hidden_TD[5] == 0).all()
    assert (out.hidden_TD[6] != 0).any()


def test_zero_tokens() -> None:
    for dispatch in options("dispatch"):
        if dispatch == "padded":
            continue
        layer, nothing, replay = moe_layer(tiny(dispatch=dispatch)), torch.zeros(0, 16), Replay()
        placement = layer.capacity(layer.router(seen(nothing), replay), 1, replay)
        (out,) = there_and_back(layer.dispatcher, nothing, placement, layer.experts).home
        out.sum().backward()
        assert out.shape == (0, 16)
        assert layer.experts.down.grad is not None
        assert (layer.experts.down.grad == 0).all()


def sent_and_reached(rank: int, world: int, dispatch: str, top_k: int, ranks_per_node: int) -> tuple[int, int]:
    """Of one layer, forward and backward on 128 tokens of 512 numbers: the bytes that leave this rank's node, and the
    (token, other node) pairs of its routing.
    """
    mesh, router = mesh_of_world(world, CPU), {**ROUTER, "top_k": top_k}
    layer = moe_layer(tiny(dispatch=dispatch, router=router, experts__num_experts=64, model__dim=512), mesh)
    expert_TK = torch.rand(128, 64, generator=torch.Generator().manual_seed(rank)).topk(top_k).indices
    layer.router = ForcedRouter(layer.router, expert_TK)
    x_TD = torch.randn(128, 512, requires_grad=True)

    def step() -> torch.Tensor:
        out_TD: torch.Tensor = layer(x_TD, ids(x_TD, 2), Replay()).hidden_TD
        out_TD.sum().backward()
        return out_TD

    sent = bytes_sent(Contestant(dispatch, step, layer.zero_grad), mesh, ranks_per_node)
    num_nodes = world // ranks_per_node
    reached_TN = torch.zeros(128, num_nodes).scatter_(1, expert_TK // (64 // num_nodes), 1.0)
    return sent, int(reached_TN.sum() - reached_TN[:, rank // ranks_per_node].sum())


@pytest.mark.parametrize("world", [2, 4])
def test_no_token_travels_twice_to_a_rank(world: int) -> None:
    """Two ways, forward and backward, of 512 fp32 numbers for each rank that a token reaches, and little else."""
    for sent, pairs in run_ranks(world, sent_and_reached, "dedup", 8, 1):
        least = 4 * 512 * 4 * pairs
        assert least < sent <= 1.05 * least
    for sent, pairs in run_ranks(world, sent_and_reached, "alltoall", 8, 1):
        assert sent > 1.5 * (4 * 512 * 4 * pairs)


def test_no_token_travels_twice_to_a_node() -> None:
    """The same for each of two nodes of two ranks."""
    for sent, pairs in run_ranks(4, sent_and_reached, "hierarchical", 8, 2):
        least = 4 * 512 * 4 * pairs
        assert least < sent <= 1.05 * least
    for sent, pairs in run_ranks(4, sent_and_reached, "dedup", 8, 2):
        assert sent > 1.5 * (4 * 512 * 4 * pairs)


READS = [*((name, chunks) for name in SHARDED for chunks in (1, 3)), ("local", 1)]


def reads_of(rank: int, world: int) -> list[tuple[list[str], list[str]]]:
    """Of each of ``READS``, where the host waits in forward and backward; and where forward is computed again there."""
    mesh, found = mesh_of_world(world, CPU), []
    for name, chunks in READS:
        where, factor = (alone() if name == "local" else mesh), (1.0 if name == "padded" else None)
        travels = {} if name == "local" else {"dispatch__chunks": chunks}
        layer = layer_of(name, where, True, factor, **travels)
        found.append((host_waits(layer), host_waits(layer, recompute=True)))
    return found


def test_the_host_waits_once_a_layer_and_never_where_sizes_are_known() -> None:
    """Whatever the number of hops and of chunks; and once more for a forward that is computed again."""
    for found in run_ranks(4, reads_of):
        for (name, chunks), (once, twice) in zip(READS, found, strict=True):
            reads = {"padded": [], "local": ["aten._local_scalar_dense"]}.get(name, ["tolist"])
            assert (once, twice) == (reads, 2 * reads), (name, chunks)
