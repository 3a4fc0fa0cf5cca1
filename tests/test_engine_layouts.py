"""Whatever the layout, training is that of one process on the global batch: losses, clip norms and weights.

Four ranks: EP 1, 2, 4 (expert-DP 4, 2, 1) x ZeRO 0-3 and the local engine x accumulation 1, 2. SGD, because Adam hides
a wrong scale of a gradient; AdamW, bf16 and a router that sends everything to two experts at EP 2.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest

from tests.engine_runs import ONE, Case, Run, repeat_and_break, run_case, run_cases
from tests.ranks import run_ranks

WORLD = 4
ENGINES = [("local", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]
LAYOUTS = [Case(*engine, ep, accumulation) for engine in ENGINES for ep in (1, 2, 4) for accumulation in (1, 2)]
SKEWED = [Case(*engine, 2, 2, skew=True) for engine in ENGINES]
AUX = [Case(*engine, 2, accumulation, aux_only=True) for engine in ENGINES for accumulation in (1, 4)]
ADAMW = [Case(*engine, 2, 2, optim="adamw") for engine in ENGINES]
BF16 = [Case(*engine, 2, 2, dtype="bf16") for engine in ENGINES]
EXACT = LAYOUTS + SKEWED + AUX + ADAMW
REPEATED = [Case(*engine, 2, accumulation, dtype="bf16") for engine in ENGINES for accumulation in (1, 8)]


def named(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


@dataclass(frozen=True)
class Results:
    """Of every case, what each rank gave back."""

    runs: dict[Case, list[Run]]
    repeated: dict[Case, list[dict[str, float]]]


@pytest.fixture(scope="module")
def results() -> Results:
    """One start of four processes for everything here."""
    ranks = run_ranks(WORLD, run_and_repeat, EXACT + BF16, REPEATED)
    runs = {case: [rank[0][i] for rank in ranks] for i, case in enumerate(EXACT + BF16)}
    return Results(runs, {case: [rank[1][i] for rank in ranks] for i, case in enumerate(REPEATED)})


def run_and_repeat(
    rank: int, world: int, cases: list[Case], repeated: list[Case]
) -> tuple[list[Run], list[dict[str, float]]]:
    return run_cases(rank, world, cases), repeat_and_break(rank, world, repeated)


@cache
def reference(case: Case) -> Run:
    """The same training by the local engine on one process, whole batches at once."""
    return run_case(dataclasses.replace(case, engine="local", zero_stage=0, ep_size=1, accumulation=1), ONE)


def worst(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def is_expert(name: str) -> bool:
    return ".experts." in name


@named(EXACT)
def test_losses_are_those_of_one_process(results: Results, case: Case) -> None:
    for run in results.runs[case]:
        assert run.losses == pytest.approx(reference(case).losses, rel=1e-5)


@named(EXACT)
def test_evaluation_and_logits_between_steps_are_those_of_one_process(results: Results, case: Case) -> None:
    for run in results.runs[case]:
        np.testing.assert_allclose(run.evals, reference(case).evals, rtol=1e-4)


@named(EXACT)
def test_trap02_expert_gradient_not_scaled_by_ep(results: Results, case: Case) -> None:
    for name, wanted in reference(case).weights.items():
        if is_expert(name):
            group = slice(0, case.ep_size), slice(WORLD - case.ep_size, WORLD)
            for ranks in group:  # the first and the last EP group: replicas must be the same
                got = np.concatenate([run.weights[name] for run in results.runs[case][ranks]])
                assert worst(got, wanted) < 1e-5, name


@named(EXACT)
def test_dense_weights_are_those_of_one_process(results: Results, case: Case) -> None:
    for name, wanted in reference(case).weights.items():
        if not is_expert(name):
            assert all(worst(run.weights[name], wanted) < 1e-5 for run in results.runs[case]), name


@named(EXACT)
def test_trap03_clip_norm_counts_distinct_experts(results: Results, case: Case) -> None:
    for run in results.runs[case]:
        assert run.norms == pytest.approx(reference(case).norms, rel=1e-5)
    assert min(reference(case).norms) > 0.5 or case.aux_only  # or nothing was clipped


@named(SKEWED)
def test_trap14_experts_without_tokens_stay_but_for_their_decay(results: Results, case: Case) -> None:
    fresh = run_case(dataclasses.replace(case, engine="local", ep_size=1, accumulation=1), ONE, num_steps=0).weights
    decayed = (1 - 0.1 * 0.1) * (1 - 0.2 * 0.1) * (1 - 0.3 * 0.1)
    for name, start in fresh.items():
        if is_expert(name):
            got = np.concatenate([run.weights[name] for run in results.runs[case][:2]])
            np.testing.assert_allclose(got[2:], decayed * start[2:], rtol=1e-5)
            assert worst(got[:2], decayed * start[:2]) > 1e-3


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: f"{engine[0]}{engine[1]}")
def test_trap15_aux_gradient_independent_of_accumulation(results: Results, engine: tuple[str, int]) -> None:
    one, four = (results.runs[Case(*engine, 2, accumulation, aux_only=True)][0] for accumulation in (1, 4))
    assert one.norms == pytest.approx(four.norms, rel=1e-5)
    assert min(one.norms) > 0


@named(BF16)
def test_bf16_is_near_one_process_in_bf16(results: Results, case: Case) -> None:
    for run in results.runs[case]:
        assert run.losses == pytest.approx(reference(case).losses, rel=2e-3)
        assert run.norms == pytest.approx(reference(case).norms, rel=2e-2)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: f"{engine[0]}{engine[1]}")
def test_trap11_bf16_micro_batches_add_up_in_fp32(results: Results, engine: tuple[str, int]) -> None:
    """8 equal micro-batches, each divided by 8, are one: exactly so in fp32, only roughly in bf16."""
    once, often = (results.repeated[Case(*engine, 2, accumulation, dtype="bf16")][0] for accumulation in (1, 8))
    assert often["norm"] == pytest.approx(once["norm"], rel=1e-6)


@named(REPEATED)
def test_a_norm_that_is_not_finite_leaves_everything_as_it_was(results: Results, case: Case) -> None:
    for result in results.repeated[case]:
        assert not np.isfinite(result["broken"])
        assert result["unchanged"]
        assert np.isfinite(result["after"])
