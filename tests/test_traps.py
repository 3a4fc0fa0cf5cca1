"""Traps that other frameworks fell into and that no other file is named after; the numbers are those of their list.

Tests of the other traps stand where the code they guard is tested. Traps of what moetrain does not have (tensor and
pipeline parallelism, padding tokens, router biases, group-limited routing, fp8) have no test; 20 asks for another order
of service than the one that moetrain is built on.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import moetrain
from moetrain.moe.capacity import slots_per_expert
from moetrain.moe.dispatch.alltoall import expert_major
from moetrain.moe.layer import MoELayer
from moetrain.moe.replay import Replay
from moetrain.monitor.balance import summarise
from moetrain.ops.kernels import torch_kernels
from moetrain.parallel.collectives import sum_over
from moetrain.parallel.mesh import mesh_of_world
from moetrain.types import LoadCounts
from tests.catalog import ROUTERS, tiny_with
from tests.ranks import run_ranks
from tests.tiny import ids, moe_layer, seen, there_and_back, tiny

CPU = torch.device("cpu")


def layer_of(dispatch: str, factor: float | None) -> MoELayer:
    config = tiny(dispatch=dispatch, capacity__factor_train=factor)
    return moe_layer(config)


def test_trap18_counts_are_added_before_ratios_are_taken() -> None:
    """Two ranks, each with all its tokens on another half of the experts: locally 2.0, globally even."""
    first, second = torch.tensor([[8, 8, 0, 0]]), torch.tensor([[0, 0, 8, 8]])
    local = summarise(LoadCounts(first, first), 2, [0])
    together = summarise(LoadCounts(first + second, first + second), 2, [0])
    assert local.load_max == 2.0
    assert together.load_max == 1.0


@pytest.mark.parametrize(
    ("dispatch", "factor", "reads"),
    [("alltoall", None, 1), ("alltoall", 1.0, 1), ("dedup", None, 1), ("dedup", 1.0, 1), ("padded", 1.0, 0)],
)
def test_trap24_host_reads_of_a_dispatch(
    dispatch: str, factor: float | None, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every read of a tensor by the host is a synchronisation on an accelerator: one a layer dropless, none padded."""
    layer, lists = layer_of(dispatch, factor), []
    plain = torch.Tensor.tolist

    def tolist(self: torch.Tensor) -> Any:
        lists.append(self.shape)
        return plain(self)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    x_TD = torch.randn(24, 16, requires_grad=True)
    with HostReads() as hidden:
        routing = layer.router(seen(x_TD), Replay())
        placement = layer.capacity(routing, 2, Replay())
        layer.load.record(placement)
        layer.balance(routing, 2, layer.load.pending_2E[0])
        (home_TD,) = there_and_back(layer.dispatcher, x_TD, placement, lambda sent: sent.x_CD * 1.0).home
        home_TD.sum().backward()
    assert hidden.seen == []
    assert len(lists) == reads


class HostReads(TorchDispatchMode):
    """Operators whose result, or whose shape, the host must read from the device, or which copy a host's number to it
    (``torch.tensor``): both wait for the device.
    """

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal", "bincount", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(t is not None and t.dtype == torch.bool for t in args[1])
        counted = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in self.READS or by_mask or counted:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_trap24_the_watch_sees_hidden_reads() -> None:
    """The check above has teeth."""
    x = torch.tensor([1, 0, 2])
    reads = [lambda: x[x > 0], lambda: x.nonzero(), lambda: x.sum().item(), lambda: x.repeat_interleave(x)]
    for read in [*reads, lambda: torch.tensor(3.0, device=x.device)]:
        with HostReads() as hidden:
            read()
        assert len(hidden.seen) >= 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ROUTERS)
def test_trap24_host_reads_of_a_whole_layer(name: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load, gauges, statistics and backward included: only the dispatch reads, its counts, once.

    BASE's assignment in training is an auction of as many rounds as it takes: whether it is over must be read. The
    experts stand aside: torch's grouped product reads where they end on a CPU, and nothing on an accelerator.
    """
    if name == "base_layers" and training:
        pytest.skip("an auction lasts as long as somebody bids")
    layer, lists = moe_layer(tiny_with(name, capacity__factor_train=1.0, capacity__factor_eval=1.0)), []
    layer.train(training)
    monkeypatch.setattr(layer.experts, "forward", lambda sent: sent.x_CD * 1.0)
    plain = torch.Tensor.tolist

    def tolist(self: torch.Tensor) -> Any:
        lists.append(self.shape)
        return plain(self)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    x_TD = torch.randn(24, 16, requires_grad=True)
    tokens_BS = ids(x_TD, 2)
    layer(x_TD, tokens_BS, Replay())  # the first routing is held against the contract, which reads it, once
    lists.clear()
    with HostReads() as hidden:
        out = layer(x_TD, tokens_BS, Replay())
        (out.hidden_TD.sum() + sum(out.losses.named().values())).backward()
        if training:
            layer.commit()
    assert hidden.seen == []
    assert len(lists) == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6))
def test_trap27_rows_that_come_rank_by_rank_are_grouped_by_expert(ranks: int, experts: int, seed: int) -> None:
    """On random count matrices, zeros included: expert by expert, and within an expert rank by rank."""
    counts_Ge = torch.randint(0, 4, (ranks, experts), generator=torch.Generator().manual_seed(seed))
    arrived = [(e, g, i) for g in range(ranks) for e in range(experts) for i in range(int(counts_Ge[g, e]))]
    order_R = expert_major(counts_Ge, len(arrived)).assignment_R
    assert [arrived[i] for i in order_R.tolist()] == sorted(arrived)


@pytest.mark.parametrize("dispatch", ["local", "alltoall"])
def test_trap25_an_expanded_gradient_goes_through_the_layer(dispatch: str) -> None:
    """``sum().backward()`` hands down a gradient of stride 0, which a grouped product would refuse."""
    layer = layer_of(dispatch, None)
    layer.experts.kernels = torch_kernels()
    x_TD = torch.randn(24, 16)
    layer(x_TD, ids(x_TD, 2), Replay()).hidden_TD.sum().backward()
    assert layer.experts.down.grad is not None
    assert layer.experts.down.grad.abs().sum() > 0


def test_trap23_no_nondeterministic_counting() -> None:
    """bincount and histc synchronise, or lack kernels, or are not deterministic on some back ends."""
    rooms = ("ops", "moe", "models", "engine", "monitor", "parallel")
    files = [path for room in rooms for path in (Path(moetrain.__file__).parent / room).rglob("*.py")]
    assert len(files) > 30
    for path in files:
        assert not re.search(r"\b(bincount|histc)\(", path.read_text()), path


def test_trap19_capacity_follows_from_the_configuration_alone() -> None:
    """Whatever the routing, every rank has the same slots: else ranks of one all-to-all disagree about its size."""
    layer = layer_of("padded", 1.0)
    shapes = set()
    for scale in (0.0, 1.0, 100.0):
        placement = layer.capacity(layer.router(seen(torch.randn(24, 16) * scale), Replay()), 1, Replay())
        done = there_and_back(layer.dispatcher, torch.randn(24, 16), placement, layer.experts)
        shapes.add((placement.capacity, done.arrived[0].x_CD.shape))
    assert shapes == {(slots_per_expert(24, 2, 8, 1.0, 4), torch.Size([8 * 6, 16]))}


def sums(rank: int, world: int) -> tuple[np.ndarray, np.ndarray]:
    mesh = mesh_of_world(1, CPU)
    mine = torch.tensor([float(rank + 1)])
    total = sum_over(mine, mesh.world_group)
    return mine.numpy(), total.numpy()


def test_trap_t16_a_reduction_leaves_its_input_alone() -> None:
    for rank, (mine, total) in enumerate(run_ranks(2, sums)):
        assert mine == [rank + 1.0]
        assert total == [3.0]


def test_trap11_counts_are_int64_and_do_not_saturate() -> None:
    """bf16 counters stop growing at 256."""
    layer = layer_of("local", None)
    for _ in range(40):
        x_TD = torch.randn(24, 16)
        layer(x_TD, ids(x_TD, 2), Replay())
        layer.commit()
    taken_2E = layer.load.take()
    assert taken_2E.dtype == torch.int64
    assert taken_2E.sum(1).tolist() == [40 * 48, 40 * 48]
