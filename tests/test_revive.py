"""Dead experts restarted from busy ones: who, when, what exactly, and the same under every layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moetrain.control.revive import Revive, sources
from moetrain.engine import make_engine
from moetrain.models.decoder import Decoder
from tests.control_runs import (
    FULL,
    RESTARTS,
    Layout,
    merged,
    restarted,
    restarted_layouts,
    revived_at,
    seen,
    shares,
    train,
)
from tests.ranks import run_ranks
from tests.tiny import VOCAB, alone, tiny


def test_the_dead_are_shared_out_over_the_busy() -> None:
    dead_E = np.array([False, False, True, True, True, True])
    assert sources(dead_E, np.array([60, 50, 0, 0, 0, 0])) == [(2, 0), (3, 1), (4, 0), (5, 1)]
    assert sources(dead_E, np.array([90, 10, 0, 0, 0, 0])) == [(2, 0), (3, 0), (4, 0), (5, 0)]
    assert sources(dead_E, np.zeros(6, dtype=np.int64)) == []


def steps_of(actions: list[Any]) -> list[int]:
    return sorted({step for step, _ in actions})


COLLAPSED = {
    "router": {**FULL, "noise": "none", "bias": "none"},
    "debug__collapsed_router": True,
    "optim__name": "adamw",
    "optim__lr": 3e-3,
    "train__steps": 30,
}


def test_revival_ends_a_planted_collapse() -> None:
    plain, _ = train(tiny(**COLLAPSED))
    assert max(b.effective_experts_mean for b in plain.balances) < 2.01
    story, _ = train(tiny(**COLLAPSED, control__revive_after_steps=10))
    assert steps_of(story.actions)[0] == 10
    assert len([a for step, a in story.actions if step == 10]) == 2  # both layers
    assert story.actions[0][1].data["experts"] == [2, 3, 4, 5, 6, 7]
    assert set(story.actions[0][1].data["from"]) == {0, 1}
    assert [b.effective_experts_mean < 2.01 for b in story.balances[:3]] == [True, True, False]
    assert story.balances[-1].effective_experts_mean > 4


def test_dead_is_who_had_no_token_for_so_many_steps_on_end() -> None:
    model = Decoder(tiny(), alone(), VOCAB)
    revive = Revive(tiny(), 20, model, make_engine(tiny(), model, alone(), 1), alone())
    idle, busy = seen([[8, 7, 6, 5, 4, 3, 2, 0]] * 2), seen([[8, 7, 6, 5, 4, 3, 2, 1]] * 2)
    assert [revive.act(window) for window in (idle, busy, idle)] == [[], [], []]
    first, second = revive.act(idle)
    assert (first.data["layer"], first.data["experts"], first.data["from"]) == (0, [7], [0])
    assert second.message == "layer 1: experts restarted (7 from 0): no token in 20 steps"
    assert revive.act(idle) == []


def test_an_expert_is_not_restarted_for_ever() -> None:
    def restarts(limit: int) -> int:
        changes = {**COLLAPSED, "control__revive_after_steps": 1, "control__revive_max": limit}
        story, _ = train(tiny(**changes), window_steps=1)
        return int(story.numbers[-1]["control/restarts"])

    assert restarts(1) == 12
    assert 12 < restarts(2) <= 24


def expected_of(before: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without noise: what every tensor must be after ``RESTARTS``."""
    after = {key: value.copy() for key, value in before.items()}
    for one in RESTARTS:
        moe = f"blocks.{one.layer}.moe"
        for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
            key = f"weight/{moe}.experts.{name}/{{:05d}}"
            after[key.format(one.expert)] = before[key.format(one.source)]
        for key in (f"weight/{moe}.router.{n}" for n in ("gate", "gate_bias", "noise.gate")):
            after[key].reshape(8, -1)[one.expert] = before[key].reshape(8, -1)[one.source]
        after[f"buffer/{moe}.router.bias_E"][one.expert] = before[f"buffer/{moe}.router.bias_E"][one.source]
    return after


def is_restarted(key: str) -> bool:
    return any(key.endswith(f"blocks.{r.layer}.moe.experts.{n}/{r.expert:05d}") for r in RESTARTS for n in NAMES)


NAMES = ("gate_up", "down", "gate_up_bias", "down_bias")


def test_a_restart_copies_perturbs_and_forgets() -> None:
    found = restarted(Layout("local", 0, 1), alone())
    before, after = merged([found.before]), merged([found.after])
    for key, expected in expected_of(before).items():
        if key.startswith("optimizer/"):
            continue
        rms = np.sqrt(np.square(expected).mean())
        same = np.array_equal(after[key], expected)
        matrix = is_restarted(key) or key.endswith(("router.gate",))
        assert same != (matrix and rms > 0), key
        assert np.abs(after[key] - expected).max() <= 0.6 * np.abs(expected).max(), key
        if is_restarted(key) and rms > 0:
            assert np.sqrt(np.square(after[key] - expected).mean()) == pytest.approx(0.1 * rms, rel=0.25)
    for moment in ("exp_avg", "exp_avg_sq"):
        for key in [key for key in after if key.startswith(f"optimizer/{moment}/")]:
            assert is_restarted(key) == (before[key].any() and not after[key].any()) or not before[key].any(), key
        gate_ED = after[f"optimizer/{moment}/blocks.1.moe.router.gate"].reshape(8, -1)
        assert gate_ED.any(axis=1).tolist() == [True, True, False, False, True, True, True, True]
    assert after["optimizer/step"] == before["optimizer/step"] == 1


LAYOUTS = [
    Layout("local", 0, 1),
    Layout("local", 0, 2),
    Layout("deepspeed", 0, 2),
    Layout("deepspeed", 1, 2),
    Layout("deepspeed", 2, 1),
    Layout("deepspeed", 3, 2),
    Layout("local", 0, 2, "bf16"),
    Layout("deepspeed", 1, 2, "bf16"),
    Layout("deepspeed", 2, 2, "bf16"),
]


def test_a_restart_is_the_same_under_every_layout() -> None:
    """To the bit: weights and buffers of two ranks are those of one process; the model computes with them."""
    alone_by = {dtype: restarted(Layout("local", 0, 1, dtype), alone()) for dtype in ("fp32", "bf16")}
    assert all(abs(one.losses[0] - one.losses[1]) > 0.003 for one in alone_by.values())
    assert alone_by["bf16"].losses == pytest.approx(alone_by["fp32"].losses, abs=5e-4)
    by_rank = run_ranks(2, restarted_layouts, LAYOUTS)
    for layout, *ranks in zip(LAYOUTS, *by_rank, strict=True):
        expected, found = merged([alone_by[layout.dtype].after]), merged([r.after for r in ranks])
        assert expected.keys() == found.keys()
        for key in expected:
            if not key.startswith("optimizer/"):
                assert np.array_equal(found[key], expected[key]), (layout, key)
            elif is_restarted(key):
                assert not found[key].any(), (layout, key)
        for rank in ranks:
            close = 2e-5 if layout.dtype == "fp32" else 1e-3
            assert rank.losses == pytest.approx(alone_by[layout.dtype].losses, abs=close), layout
            assert rank.norm == ranks[0].norm > 0


def test_a_revived_run_is_the_same_on_two_ranks() -> None:
    changes = {**COLLAPSED, "control__revive_after_steps": 5, "train__steps": 8, "optim__name": "sgd"}
    story, engine = train(tiny(**changes))
    expected = merged([shares(engine)])
    assert steps_of(story.actions) == [5]
    for ep_size in (1, 2):
        ranks = run_ranks(2, revived_at, ep_size, changes)
        assert all(actions == [action.message for _, action in story.actions] for actions, _ in ranks)
        for key, values in merged([part for _, part in ranks]).items():
            np.testing.assert_allclose(values, expected[key], rtol=1e-4, atol=1e-6, err_msg=key)
