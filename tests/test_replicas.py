"""One flipped bit in one replica is found and named; runs in which nothing was flipped are silent."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moetrain.engine import Engine, make_engine
from moetrain.health import Replicas
from moetrain.health.replicas import verdict
from moetrain.parallel.mesh import Mesh, mesh_of_world
from tests.engine_runs import CPU, ONE, Case, Run, partition_everything, train
from tests.ranks import run_ranks
from tests.toy import Toy, toy_config

ENGINES = [("local", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]
FP32 = [Case(*engine, 2, optim="adamw") for engine in ENGINES]
BF16 = [Case(*engine, 2, dtype="bf16", optim="adamw") for engine in ENGINES]
WORLD = 4


def weight(name: str) -> Callable[[Engine], Tensor]:
    return lambda engine: engine.model.get_parameter(name).data


def bias(engine: Engine) -> Tensor:
    return engine.model.get_buffer("moe.1.router.bias_E")


def moment(engine: Engine) -> Tensor:
    return next(p.values_X for p in engine.state().held if p.key == "optimizer/exp_avg_sq/norm.weight")


FLIPS: dict[str, tuple[Callable[[Engine], Tensor], int, int]] = {
    "dense": (weight("embedding.weight"), 9, 3),
    "expert": (weight("moe.0.experts.up"), 2 * 8 * 12 + 5, 1),
    "bias": (bias, 4, 2),
    "moment": (moment, 1, 0),
}

"""Of what, of which value, on which rank."""


def flip(values: Tensor, index: int) -> None:
    """Its lowest bit."""
    bytes_X = values.view(-1).view(torch.uint8)
    bytes_X[index * values.element_size()] ^= 1


def reports(rank: int, world: int, cases: list[Case]) -> list[dict[str, str]]:
    """Of each case after one step: what is said of it whole, and with one bit flipped, which is then flipped back."""
    partition_everything()
    return [of_case(case, mesh_of_world(case.ep_size, CPU)) for case in cases]


def of_case(case: Case, mesh: Mesh) -> dict[str, str]:
    config = toy_config(case.engine, case.zero_stage, dtype=case.dtype, optim=case.optim)
    config = dataclasses.replace(config, health=dataclasses.replace(config.health, replicas_every=2))
    engine = make_engine(config, Toy(mesh), mesh, case.accumulation)
    replicas = Replicas(config, engine, mesh)
    train(engine, mesh, case.accumulation, range(2), Run())
    found = {"clean": replicas.report(2, saves=False)}
    for name, (of, index, victim) in FLIPS.items():
        if (case.zero_stage == 3 and name != "bias") or (case.zero_stage and name == "moment"):
            continue
        for _ in range(2):
            if mesh.rank == victim:
                flip(of(engine), index)
            found.setdefault(name, replicas.report(2, saves=False))
    found["mended"] = replicas.report(2, saves=False)
    flip(bias(engine), mesh.rank)
    found["not due"], found["due by a save"] = replicas.report(3, saves=False), replicas.report(3, saves=True)
    return found


@pytest.fixture(scope="module")
def found() -> dict[Case, list[dict[str, str]]]:
    ranks = run_ranks(WORLD, reports, FP32 + BF16)
    return {case: [rank[i] for rank in ranks] for i, case in enumerate(FP32 + BF16)}


@pytest.mark.parametrize("case", FP32 + BF16, ids=lambda case: case.name)
def test_a_flipped_bit_is_named_on_every_rank(found: dict[Case, list[dict[str, str]]], case: Case) -> None:
    for told in found[case]:
        assert told == found[case][0]
        assert told["clean"] == told["mended"] == told["not due"] == ""
        assert "buffer/moe.1.router.bias_E: ranks [0] against ranks [1] against" in told["due by a save"]
        assert "buffer/moe.1.router.bias_E: ranks [2] are wrong, 3 others agree" in told["bias"]
        if case.zero_stage == 3:
            continue
        kind = "weight" if case.zero_stage == 0 and case.dtype == "fp32" else "model"
        assert told["dense"].splitlines()[1:] == [f"  {kind}/embedding.weight: ranks [3] are wrong, 3 others agree"]
        (line,) = told["expert"].splitlines()[1:]
        assert line.startswith(f"  {kind}/moe.0.experts.up/00006: ranks [1] against ranks [3], no majority")
        if case.zero_stage == 0:
            assert "optimizer/exp_avg_sq/norm.weight: ranks [0] are wrong" in told["moment"]


def test_the_minority_is_wrong() -> None:
    assert verdict({0: (1,), 2: (1,)}) == ""
    assert verdict({0: (1,), 2: (5,), 4: (1,)}) == "ranks [2] are wrong, 2 others agree"
    assert verdict({0: (1,), 1: (5,)}) == "ranks [0] against ranks [1], no majority tells who is wrong"


def test_one_rank_has_nothing_to_compare_and_zero_says_what_it_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    config = toy_config("deepspeed", 3)
    config = dataclasses.replace(config, health=dataclasses.replace(config.health, replicas_every=1))
    engine = make_engine(toy_config("local"), Toy(ONE), ONE, 1)
    assert Replicas(config, engine, ONE).report(1, saves=True) == ""
    with caplog.at_level(logging.INFO):
        Replicas(config, engine, dataclasses.replace(ONE, world_size=2))
    assert "at ZeRO 3 each rank has weights and optimiser state of its own" in caplog.text
