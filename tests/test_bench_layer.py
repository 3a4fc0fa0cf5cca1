"""The benchmark of a layer: everybody gets the same work, and says so, before anything is timed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.bench import layer as bench
from moetrain.bench import limit
from moetrain.bench.command import layer_configs
from moetrain.bench.layer import bench_layer, write_results
from moetrain.bench.routing import ROUTINGS, Routing, gate_of, tokens_of
from moetrain.cli import main
from moetrain.ops.kernels import Kernels, torch_gemm
from moetrain.ops.loop_swiglu import loop_swiglu
from moetrain.parallel.mesh import mesh_of_world
from moetrain.types import ConfigError
from tests.ranks import run_ranks
from tests.tiny import alone


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    """DeepSpeed's layer needs a process group, also where there is one process."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


SMALL = ["model.dim=32", "model.expert_dim=16", "model.context=64", "machine.device=cpu"]


def test_everybody_is_there_with_the_same_output_under_every_routing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (config,) = layer_configs([*SMALL, "experts=e8", "router.top_k=3"], 1, None)
    results = bench_layer([config], alone(), 2, ROUTINGS)
    names = [one.name for one in results if one.routing == "zipf"]
    hugging_face = ["transformers grouped_mm", "transformers eager"]
    theirs = [*hugging_face, "DeepSpeed, capacity 1.25", "DeepSpeed, dropless", "DeepSpeed AutoEP"]
    assert names == ["moetrain", "moetrain, torch grouped_mm", *theirs, "products alone"]
    assert [one.note for one in results if one.note] == ["drops tokens", "no layer, the limit"] * 3
    assert all(len(one.samples) == 2 and min(one.samples[0].wall, one.samples[0].cpu) > 0 for one in results)
    text = capsys.readouterr().out
    assert "8 experts, k = 3, D = 32, F = 16, 128 tokens a rank" in text
    write_results(results, tmp_path / "deep" / "times.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "deep" / "times.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    assert rows[0]["contestant"] == "moetrain"
    assert rows[0]["routing"] == "balanced"
    assert len(rows[0]["cpu"]) == 2


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_limit_is_all_products_of_a_layer_and_nothing_else(
    routing: Routing, monkeypatch: pytest.MonkeyPatch
) -> None:
    products: list[tuple[int, ...]] = []

    def counted(a_MK: Tensor, b_NK: Tensor, out: Tensor | None = None) -> Tensor:
        products.append((a_MK.shape[0], a_MK.shape[1], b_NK.shape[0]))
        return torch_gemm(a_MK, b_NK, out)

    monkeypatch.setattr(limit, "torch_gemm", counted)
    (config,) = layer_configs([*SMALL, "experts=e8", "router.top_k=3"], 1, None)
    case = bench.layer_case(config, alone(), routing)
    limit.products_alone(case, "torch").step()
    alone_shapes, products[:] = sorted(products), []
    kernels = Kernels("torch", "loop or grouped_mm", torch.nn.functional.linear, partial(loop_swiglu, counted))
    bench.our_contestant(bench.our_layer(case, config, kernels), case, "ours").step()
    assert len(products) == 6 * 8
    assert sorted(products) == alone_shapes


def test_who_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    (config,) = layer_configs([*SMALL, "experts=e4"], 1, None)
    drawn = bench.peers

    def twisted(case: bench.LayerCase) -> object:
        return drawn(replace(case, down_eDF=case.down_eDF * 1.01))

    monkeypatch.setattr(bench, "peers", twisted)
    with pytest.raises(AssertionError, match="transformers grouped_mm differs from ours"):
        bench_layer([config], alone(), 1, ["natural"])


def test_only_those_named_are_timed() -> None:
    (config,) = layer_configs([*SMALL, "experts=e4"], 1, None)
    results = bench_layer([config], alone(), 1, ["natural"], ["eager", "AutoEP"])
    assert [one.name for one in results] == ["moetrain", "transformers eager", "DeepSpeed AutoEP"]
    with pytest.raises(ConfigError, match="name parts of 'moetrain, torch grouped_mm', 'transformers"):
        bench_layer([config], alone(), 1, ["natural"], ["eagre"])


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_tokens_choose_what_the_benchmark_wants(top_k: int) -> None:
    gate_ED = gate_of(16, 64, seed=3)
    for routing, least, most in (("balanced", 1.0, 1.0), ("zipf", 2.0, 8.0)):
        x_TD = tokens_of(routing, gate_ED, 512, top_k, seed=5)  # type: ignore[arg-type]
        counts_E = torch.zeros(16).scatter_add_(
            0, (x_TD @ gate_ED.t()).topk(top_k).indices.flatten(), torch.ones(512 * top_k)
        )
        assert least <= counts_E.max() / counts_E.mean() <= most, routing
        assert counts_E.argmax() == 0 or routing == "balanced"


def _two_ranks(rank: int, world: int) -> list[tuple[str, str, bool]]:
    (config,) = layer_configs([*SMALL, "experts=e4"], world, None)
    mesh = mesh_of_world(world, torch.device("cpu"))
    results = bench_layer([config], mesh, 1, ["zipf"])
    return [(one.name, one.note, one.sent > 0) for one in results]


def test_everybody_is_there_with_the_same_output_on_two_ranks() -> None:
    found = run_ranks(2, _two_ranks)
    per_copy = ["moetrain, a copy for each expert", "a copy for each expert, torch grouped_mm"]
    theirs = ["DeepSpeed, capacity 1.25", "DeepSpeed, dropless", "DeepSpeed AutoEP"]
    assert [name for name, _, _ in found[0]] == ["moetrain", *per_copy, *theirs]
    assert [name for name, note, _ in found[0] if note] == ["DeepSpeed, capacity 1.25"]
    assert all(sent for _, _, sent in found[0])


def _rounded(rank: int, world: int) -> dict[tuple[bool, str, str], int]:
    mesh = mesh_of_world(world, torch.device("cpu"))
    sent: dict[tuple[bool, str, str], int] = {}
    for payload in ("exact", "bf16", "fp8"):
        words = [*SMALL, "experts=e4", "dispatch=alltoall", f"dispatch.payload={payload}", "dispatch.chunks=2"]
        (config,) = layer_configs(words, world, None)
        for exchange in (False, True):
            results = bench_layer([config], mesh, 1, ["zipf"], exchange_only=exchange)
            sent |= {(exchange, payload, one.name): one.sent for one in results}
    return sent


def test_payload_and_chunks_are_those_of_all_our_dispatchers() -> None:
    words = ["dispatch=hierarchical", "dispatch.ranks_per_node=2", "dispatch.payload=fp8", "dispatch.chunks=2"]
    config = layer_configs([*SMALL, *words], 1, None)[0]
    assert bench._dispatch(config, bench.HIERARCHICAL) == config.dispatch
    for target in (bench.ALLTOALL, bench.PADDED, bench.DEDUP):
        assert bench._dispatch(config, target) == {"_target_": target, "payload": "fp8", "chunks": 2}
    for sent in run_ranks(2, _rounded):
        for exchange, name in ((False, "moetrain, a copy for each expert"), (True, "dedup"), (True, "alltoall")):
            exact, bf16, fp8 = (sent[exchange, payload, name] for payload in ("exact", "bf16", "fp8"))
            assert exact > bf16 > fp8, name


def test_commas_list_shapes_and_what_is_typed_goes_first() -> None:
    configs = layer_configs(["experts=e4,e16", "router.top_k=2,3", "engine.dtype=bf16"], 2, None)
    assert [(c.experts.num_experts, c.router["top_k"]) for c in configs] == [(4, 2), (4, 3), (16, 2), (16, 3)]
    assert {c.engine.dtype for c in configs} == {"bf16"}
    assert configs[0].dispatch["_target_"].endswith("DedupDispatcher")


def test_a_benchmark_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "speed"]) == 2
    assert "choose of layer" in capsys.readouterr().err
