"""Learning-rate schedules: their end points, their middle, and that they are monotone where they should be."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from moetrain.config import OptimConfig
from moetrain.optim import lr_at

STEPS = 100


def curve(**options: Any) -> list[float]:
    optim = OptimConfig(lr=2.0, min_lr_ratio=0.1, **options)
    return [lr_at(step, STEPS, optim) for step in range(STEPS)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_its_last_update_has_the_full_rate(schedule: str) -> None:
    lrs = curve(schedule=schedule, warmup_steps=10)
    assert lrs[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert lrs[10] == pytest.approx(2.0)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_last_update_has_the_minimum_and_so_has_all_that_comes_after(schedule: str) -> None:
    assert curve(schedule=schedule, warmup_steps=10)[-1] == pytest.approx(0.2)
    assert lr_at(5 * STEPS, STEPS, OptimConfig(lr=2.0, schedule=schedule)) == pytest.approx(0.2)


def test_cosine_starts_full_without_warm_up_and_is_half_way_in_the_middle() -> None:
    optim = OptimConfig(lr=2.0, schedule="cosine", min_lr_ratio=0.0)
    assert [lr_at(s, 101, optim) for s in (0, 50, 100)] == pytest.approx([2.0, 1.0, 0.0], abs=1e-12)


def test_wsd_is_flat_and_then_falls_in_equal_parts_over_the_decay_fraction() -> None:
    lrs = curve(schedule="wsd", decay_fraction=0.2)
    assert lrs[:80] == [2.0] * 80
    assert [a - b for a, b in itertools.pairwise(lrs[79:])] == pytest.approx([1.8 / 20] * 20)


def test_constant_stays() -> None:
    assert curve(schedule="constant") == [2.0] * STEPS


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_a_run_of_one_update_has_a_rate_above_zero(schedule: str) -> None:
    assert lr_at(0, 1, OptimConfig(lr=2.0, schedule=schedule, min_lr_ratio=0.1)) > 0.19


def test_warm_up_wins_where_it_reaches_into_the_decay() -> None:
    lrs = curve(schedule="wsd", warmup_steps=90, decay_fraction=0.2)
    assert lrs[:90] == sorted(lrs[:90])
    assert lrs[90:] == sorted(lrs[90:], reverse=True)
