"""The benchmark of overlap: what it times is there, and sleeps."""

from __future__ import annotations

import pytest
import torch

from moetrain.bench.command import layer_configs
from moetrain.bench.overlap import bench_overlap
from moetrain.cli import main
from moetrain.parallel.mesh import mesh_of_world
from tests.ranks import run_ranks

SMALL = ["model.dim=32", "model.expert_dim=16", "model.context=64", "machine.device=cpu", "dispatch=alltoall"]


def overlap(rank: int, world: int) -> str | None:
    config = layer_configs(SMALL, world, None)[0]
    return bench_overlap(config, mesh_of_world(world, torch.device("cpu")), 2)


def test_it_tells_the_layer_beside_its_bound() -> None:
    text, other = run_ranks(2, overlap)
    assert other is None
    assert text.splitlines()[0].startswith("2 ranks")
    for chunks in (1, 2, 4, 8):
        assert f"\n{chunks} chunks" in text
    assert text.splitlines()[-1].startswith("a shared expert that sleeps as long")


@pytest.mark.parametrize("action", ["overlap", "skew"])
def test_one_rank_and_several_shapes_are_refused(
    action: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", action]) == 2
    assert f"-m moetrain bench {action}" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["bench", action, "--", "experts=e4,e8"]) == 2
    assert "one shape at a time" in capsys.readouterr().err
