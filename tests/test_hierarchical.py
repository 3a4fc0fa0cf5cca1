"""Node, then rank: four ranks that are two nodes of two."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moetrain.bench.command import layer_configs
from moetrain.bench.layer import bench_layer
from moetrain.compose import compose
from moetrain.moe.dispatch.merging import Merging
from moetrain.moe.journey import set_out, travel
from moetrain.moe.layer import MoELayer
from moetrain.moe.replay import Replay
from moetrain.parallel.mesh import mesh_of_world
from moetrain.rules.layout import nodes_of_ep_group
from moetrain.types import ConfigError
from tests.ranks import run_ranks
from tests.test_bench_layer import SMALL
from tests.test_exchange import Told, Work
from tests.test_traps import HostReads
from tests.tiny import ids, moe_layer, seen, there_and_back, tiny

CPU = torch.device("cpu")
TOKENS = 16
VARIANTS = [("exact", 1), ("exact", 3), ("exact", 17), ("bf16", 2), ("fp8", 1)]


def passed(layer: MoELayer, rank: int) -> dict[str, np.ndarray]:
    """Forward and backward: output and all gradients."""
    dim = layer.router.get_parameter("gate").shape[1]
    x_TD = torch.randn(TOKENS, dim, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    out = layer(x_TD, ids(x_TD, 2), Replay())
    out.hidden_TD.square().sum().backward()
    assert x_TD.grad is not None
    found = {"y": out.hidden_TD.detach(), "dx": x_TD.grad}
    return {k: v.numpy() for k, v in (found | {n: p.grad for n, p in layer.named_parameters()}).items()}


def variants(rank: int, world: int) -> dict[tuple[str, str, int], dict[str, np.ndarray]]:
    mesh, found = mesh_of_world(world, CPU), {}
    for case in [("dedup", "exact", 1), *(("hierarchical", *variant) for variant in VARIANTS)]:
        dispatch, payload, chunks = case
        config = tiny(dispatch=dispatch, dispatch__payload=payload, dispatch__chunks=chunks, model__dim=256)
        found[case] = passed(moe_layer(config, mesh), rank)
    return found


def test_chunks_change_nothing_and_payloads_little() -> None:
    for found in run_ranks(4, variants):
        for payload, chunks in VARIANTS:
            limit = {"exact": 2e-6, "bf16": 1e-2, "fp8": 6e-2}[payload]
            for name, value in found["dedup", "exact", 1].items():
                error = np.linalg.norm(found["hierarchical", payload, chunks][name] - value) / np.linalg.norm(value)
                assert error < limit, (payload, chunks, name)
                assert payload == "exact" or error > 0, "rounded nowhere"


def facts(rank: int, world: int) -> dict[str, Any]:
    """Of this rank: its hops, what making them has made, the host's reads in a layer, and hops of other nodes."""
    mesh, groups = mesh_of_world(world, CPU, timedelta(seconds=77)), dist.distributed_c10d._world.pg_map
    before, plain, reads = len(groups), torch.Tensor.tolist, []
    layers = [moe_layer(tiny(dispatch="hierarchical"), mesh) for _ in range(2)]
    made = len(groups) - before
    layer, x_TD = layers[0], torch.randn(TOKENS, 16, requires_grad=True)
    placement = layer.capacity(layer.router(seen(x_TD), Replay()), 1, Replay())
    with pytest.MonkeyPatch.context() as patch, HostReads() as hidden:
        patch.setattr(torch.Tensor, "tolist", lambda self: [reads.append("tolist"), plain(self)][1])
        done = there_and_back(layer.dispatcher, x_TD, placement, lambda sent: sent.x_CD * 1.0)
        done.home[0].sum().backward()
    hops = mesh.hops_by_node(2)
    return {
        "hops": [(dist.get_process_group_ranks(hop.group), hop.place) for hop in hops],
        "timeouts": [hop.group._get_backend(CPU).options._timeout.seconds for hop in hops if hop.group],
        "made": made,
        "reads": reads + hidden.seen,
        "travelled": done.arrived[0].num_travelled,
        "ranks": (placement.routing.expert_TK // 2).tolist(),
        "others": [mesh.hops_by_node(ranks) == (mesh.hop,) for ranks in (1, 4, 8)],
    }


def copies(rank: int, goals: set[int]) -> int:
    """How many copies of a token of ``rank`` that is for the ranks ``goals`` are sent from one rank to another."""
    relays = {goal: goal // 2 * 2 + rank % 2 for goal in goals}
    return sum(relay != rank for relay in set(relays.values())) + sum(goal != relay for goal, relay in relays.items())


def test_groups_are_made_once_and_the_host_waits_once() -> None:
    by_rank = run_ranks(4, facts)
    sent = sum(copies(rank, set(goals)) for rank, found in enumerate(by_rank) for goals in found["ranks"])
    assert sum(found["travelled"] for found in by_rank) == sent
    for rank, found in enumerate(by_rank):
        node, place = divmod(rank, 2)
        assert found["hops"] == [([place, 2 + place], node), ([2 * node, 2 * node + 1], place)]
        assert found["timeouts"] == [77, 77]
        assert found["made"] == 2
        assert found["reads"] == ["tolist"]
        assert all(found["others"])


def beside_work(rank: int, world: int) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Of a round trip in three chunks, forward and backward: exchanges of counts, and the rows that are on their way
    while something is computed; by hop.
    """
    mesh, plain, log = mesh_of_world(world, CPU), dist.all_to_all_single, list[str]()
    layer = moe_layer(tiny(dispatch="hierarchical", dispatch__chunks=3), mesh)
    across, _ = mesh.hops_by_node(2)

    def told(arriving: torch.Tensor, *args: Any, **keys: Any) -> Any:
        what = "counts" if arriving.dtype == torch.int64 else "rows" if arriving.shape[1] == 16 else "tags"
        name = f"{what}-{'across' if keys['group'] is across.group else 'within'}"
        log.append(f"start {name}")
        return Work(plain(arriving, *args, **keys), name, log)

    dist.all_to_all_single = told
    x_TD = torch.randn(TOKENS, 16, requires_grad=True)
    placement = layer.capacity(layer.router(seen(x_TD), Replay()), 1, Replay())
    departure = set_out(layer.dispatcher, x_TD, placement)
    done = travel(departure, lambda sent: Told.apply(sent.x_CD, log, "experts"), lambda: Told.apply(x_TD, log, "aside"))
    assert done.aside is not None
    (layer.dispatcher.join(done.home).sum() + done.aside.sum()).backward()
    travelling, beside = list[str](), []
    for line in log:
        verb, _, name = line.partition(" ")
        if verb == "start":
            travelling.append(name)
        elif verb == "wait":
            travelling.remove(name)
        else:
            beside.append((line, [name for name in travelling if name.startswith("rows")]))
    return [line for line in log if line.startswith("start counts")], beside


def test_the_way_between_nodes_hides_and_counts_of_all_chunks_travel_together() -> None:
    """Between nodes the next part and the last results travel while experts work, and their gradients in backward; on
    the shorter way within a node nothing does.
    """
    way = "rows-across"
    forward = [("aside", [way]), ("experts", [way]), ("experts", [way, way]), ("experts", [way, way])]
    for counts, beside in run_ranks(4, beside_work):
        assert counts == ["start counts-across", "start counts-within"]
        assert beside == forward + [(f"{work} backward", others) for work, others in reversed(forward)]


def torn(rank: int, world: int) -> str:
    """Hosts that torchrun has started other numbers of ranks on."""
    os.environ["LOCAL_WORLD_SIZE"] = "2" if rank == 0 else "1"
    config = tiny(dispatch="hierarchical", dispatch__ranks_per_node=None)
    with pytest.raises(ConfigError) as error:
        moe_layer(config, mesh_of_world(world, CPU))
    return str(error.value)


def test_nodes_of_other_sizes_are_refused_by_all() -> None:
    for text in run_ranks(2, torn):
        assert text.startswith("dispatch.ranks_per_node = ")
        assert "different ones: 2, 1" in text


def two_nodes(rank: int, world: int) -> int:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    layer = moe_layer(tiny(dispatch="hierarchical", dispatch__ranks_per_node=None), mesh_of_world(world, CPU))
    assert isinstance(layer.dispatcher, Merging)
    return len(layer.dispatcher.hops)


def test_a_node_is_what_torchrun_says() -> None:
    assert run_ranks(4, two_nodes) == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("ranks", "ep_size", "world", "fix"),
    [
        (3, None, 8, "engine.ep_size=1, or"),
        (3, 4, 12, "engine.ep_size=1, or"),
        (3, 2, 8, "engine.ep_size=1, or"),
        (4, 6, 12, "engine.ep_size=1 | 2 | 4 | 12, or"),
        (0, 4, 4, "dispatch.ranks_per_node=null"),
    ],
)
def test_nodes_that_cut_an_ep_group_are_refused(ranks: int, ep_size: int | None, world: int, fix: str) -> None:
    problem = nodes_of_ep_group(ranks, ep_size, 24 if ep_size == 6 else 8, world)
    assert problem is not None
    assert problem.field == "dispatch.ranks_per_node"
    assert fix in problem.fix


@pytest.mark.parametrize(("ranks", "ep_size", "world"), [(1, 4, 4), (2, None, 8), (2, 4, 8), (4, 4, 8), (8, 2, 8)])
def test_whole_nodes_and_even_parts_of_one_are_not(ranks: int, ep_size: int | None, world: int) -> None:
    assert nodes_of_ep_group(ranks, ep_size, 8, world) is None


def test_the_rule_is_asked_before_any_group_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"dispatch.ranks_per_node = None: .*null means 3 here"):
        compose(["recipe=quickstart", "dispatch=hierarchical", "engine.ep_size=2"], 6)
    for ep_size, world in ((2, 4), (4, 4), (8, 4)):  # an elastic run is judged by what it is lowered to
        words = ["recipe=quickstart", "dispatch=hierarchical", "run.elastic=true", f"engine.ep_size={ep_size}"]
        compose([*words, "dispatch.ranks_per_node=2"], world)


def benched(rank: int, world: int) -> dict[str, tuple[int, int]]:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    (config,) = layer_configs([*SMALL, "experts=e16", "router.top_k=4"], world, None)
    results = bench_layer([config], mesh_of_world(world, CPU), 1, ["natural"], exchange_only=True)
    return {one.name: (one.sent, one.crossing) for one in results}


def test_the_benchmark_tells_what_crosses_between_nodes() -> None:
    found = run_ranks(4, benched)[0]
    assert list(found) == ["dedup", "hierarchical", "alltoall", "padded, capacity 1.25"]
    assert all(0 < crossing < sent for sent, crossing in found.values())
    assert found["hierarchical"][1] < 0.75 * found["dedup"][1] < 0.75 * found["alltoall"][1]
