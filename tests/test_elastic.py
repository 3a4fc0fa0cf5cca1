"""run.elastic: what is fitted to the ranks there are, what no fitting helps, and that the run stays the same run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moetrain.checks import ep_size_of, fitted, refit
from moetrain.cli import main
from moetrain.compose import compose
from moetrain.config import Config
from moetrain.monitor.runfolder import config_hash
from moetrain.rules.layout import fitted_ep_size, fitted_micro_batch
from moetrain.types import ConfigError
from tests.tiny import tiny


@pytest.mark.parametrize("experts", [1, 6, 8, 12])
@pytest.mark.parametrize("world", range(1, 13))
def test_the_ep_size_is_the_largest_that_divides(experts: int, world: int) -> None:
    for asked in (*range(1, 13), None):
        works = [size for size in range(1, 13) if world % size == experts % size == 0 and size <= (asked or 12)]
        assert fitted_ep_size(asked, experts, world) == max(works)


@pytest.mark.parametrize("global_batch", [1, 8, 12])
def test_the_micro_batch_is_the_largest_that_makes_up_the_global_batch(global_batch: int) -> None:
    for world in range(1, 14):
        for asked in range(1, 14):
            works = [size for size in range(1, asked + 1) if global_batch % (world * size) == 0]
            assert fitted_micro_batch(asked, global_batch, world) == max(works, default=None)


def elastic() -> Config:
    config = tiny(engine__ep_size=4, train__global_batch=8, train__micro_batch=4)
    return replace(config, run=replace(config.run, elastic=True))


def test_fitted_keeps_the_global_batch_and_the_identity_of_the_run() -> None:
    config = elastic()
    for world, ep_size, micro_batch in ((1, 1, 4), (2, 2, 4), (4, 4, 2), (8, 4, 1)):
        here = fitted(config, world)
        assert (ep_size_of(here, world), here.train.micro_batch) == (ep_size, micro_batch)
        assert here.train.global_batch == 8
        assert fitted(here, world) == here
    rigid = replace(config, run=replace(config.run, elastic=False))
    assert fitted(rigid, 8) is rigid
    assert config_hash(rigid) == config_hash(config)


def test_what_changes_is_told() -> None:
    config = elastic()
    assert refit(config, 2) == "elastic: ep_size 4 -> 2"
    assert refit(config, 2, 2) == ""
    assert refit(config, 4, 2) == "elastic: ranks 2 -> 4, ep_size 2 -> 4, micro_batch 4 -> 2"
    assert refit(config, 1, 2) == "elastic: ranks 2 -> 1, ep_size 2 -> 1, accumulation 1 -> 2"
    assert refit(replace(config, run=replace(config.run, elastic=False)), 1, 2) == ""


QUICK = ["recipe=quickstart", "train.global_batch=8", "train.micro_batch=8", "engine.ep_size=4"]


def problems(world: int, *overrides: str) -> dict[str, tuple[str, str]]:
    try:
        compose([*QUICK, *overrides], world)
    except ConfigError as error:
        return {problem.field: (problem.reason, problem.fix) for problem in error.problems}
    return {}


def test_a_world_that_does_not_fit_is_refused_with_those_that_do() -> None:
    found = problems(2)
    assert found.keys() == {"engine.ep_size", "train.global_batch"}
    assert all("run.elastic=true" in fix for _, fix in found.values())
    assert "train.micro_batch=4" in found["train.global_batch"][1]
    assert problems(2, "run.elastic=true") == {}
    assert "elastic" not in problems(3)["train.global_batch"][1], "it would not help"
    (reason, fix) = problems(3, "run.elastic=true")["train.global_batch"]
    assert reason == "can't be shared out evenly among the 3 ranks, whatever train.micro_batch is"
    assert fix == "start 1 | 2 | 4 ranks, or set train.global_batch=6 or 9"


def test_check_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *QUICK, "run.elastic=true", "--world", "2"]) == 0
    out = capsys.readouterr().out
    assert "# layout          2 ranks: EP 2 x expert-DP 1, accumulation 1\n" in out
    assert "# elastic         ep_size 4 -> 2, micro_batch 8 -> 4\n" in out
    assert "micro_batch: 8\n" in out, "as typed"
