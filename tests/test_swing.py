"""The swing of a load within a window, against loads whose swing is known."""

from __future__ import annotations

import pytest
import torch

from moetrain.monitor.swing import Swing

MANY = 10**9


def swing_of(steps: list[list[int]]) -> float:
    swing = Swing()
    for counts in steps:
        swing.add(torch.tensor([counts]))
    return swing.of_rank().sqrt().item()


def test_a_load_that_stands_still_does_not_swing() -> None:
    assert swing_of([[MANY, 3 * MANY]] * 4) == pytest.approx(0.0, abs=1e-4)
    assert swing_of([[MANY, 3 * MANY]]) == 0.0


def test_twice_the_share_and_nothing_in_turn_is_a_swing_of_one() -> None:
    steps = [[2 * MANY, 0], [0, 2 * MANY]] * 500
    assert swing_of(steps) == pytest.approx(1.0, rel=1e-2)


def test_the_swing_is_of_shares_not_of_counts() -> None:
    assert swing_of([[MANY, MANY], [7 * MANY, 7 * MANY]]) == pytest.approx(0.0, abs=1e-4)


def test_chance_is_no_swing() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(0, 8, (64,), generator=generator).bincount(minlength=8).tolist() for _ in range(400)]
    assert swing_of(drawn) < 0.1
    raw = torch.tensor(drawn).double() / 8
    assert raw.var(dim=0).mean().sqrt().item() > 0.3
