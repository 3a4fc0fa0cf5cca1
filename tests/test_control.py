"""Corrections: the law of each, what they do to a training, and that they do nothing unless asked."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moetrain.cli import main
from moetrain.config import ControlConfig
from moetrain.control import Control
from moetrain.control.aux_coefficient import AuxCoefficient
from moetrain.control.base import Limits, steered
from moetrain.control.bias_rate import BiasRate, decayed
from moetrain.control.capacity import CapacityFactor
from moetrain.models.decoder import Decoder
from moetrain.monitor.events import read_events
from moetrain.monitor.jsonl import read_metrics
from tests.control_runs import (
    FULL,
    Story,
    seen,
    train,
)
from tests.test_config import problems_of, raw
from tests.tiny import VOCAB, alone, tiny

LIMITS = Limits(low=0.1, high=10.0, step=2.0)


@pytest.mark.parametrize(
    ("value", "ratio", "expected"),
    [
        (1.0, 1.5, 1.5),  # in proportion
        (1.0, 9.0, 2.0),  # by at most the step
        (1.0, 0.0, 0.5),
        (1.0, 1.09, 1.0),  # near enough
        (1.0, math.nan, 1.0),  # no token, no opinion
        (9.0, 9.0, 10.0),  # bounds
        (0.11, 0.1, 0.1),
        (99.0, 1.0, 10.0),  # what starts out of bounds is brought in
    ],
)
def test_the_law(value: float, ratio: float, expected: float) -> None:
    assert steered(value, ratio, LIMITS) == pytest.approx(expected)


def test_the_aux_coefficient_follows_max_vio() -> None:
    model = Decoder(tiny(balance__balance_coef=0.01), alone(), VOCAB)
    aux = AuxCoefficient(ControlConfig(aux_min=0.005, aux_max=0.02, aux_step=1.5), 0.5, model)
    (action,) = aux.act(seen([[30, 10, 0, 0]]))  # MaxVio 2
    assert (action.data["old"], action.data["new"]) == (0.01, pytest.approx(0.015))
    assert "MaxVio is 2, the target 0.5 within 0.005 to 0.02" in action.message
    assert aux.act(seen([[15, 10, 10, 5]])) == []
    aux.act(seen([[30, 10, 0, 0]]))
    assert model.balance.balance_coef == 0.02
    assert aux.act(seen([[30, 10, 0, 0]])) == []
    for _ in range(9):
        aux.act(seen([[10, 10, 10, 10]]))
    assert model.balance.balance_coef == 0.005
    assert aux.numbers() == {"control/balance_coef": 0.005}


def test_the_capacity_factor_follows_the_drops() -> None:
    model = Decoder(tiny(capacity__factor_train=1.0), alone(), VOCAB)
    capacity = CapacityFactor(ControlConfig(capacity_max=1.3, capacity_step=1.2), 0.1, model, 1.0)
    (action,) = capacity.act(seen([[20, 20]], [[10, 20]]))  # a quarter was dropped
    assert action.data["new"] == pytest.approx(1.2)
    assert "25.00% were dropped, the target is 10.00% within 1 to 1.3" in action.message
    layer = model.moe_layers()[-1].capacity.train()
    assert layer._slots(80, 1) == 24  # 2 of 8 experts for 80 tokens, times 1.2
    assert layer.eval()._slots(80, 1) is None
    capacity.act(seen([[20, 20]], [[10, 20]]))
    assert layer.factor_train == 1.3
    capacity.act(seen([[20, 20]]))
    assert layer.factor_train == pytest.approx(1.3 / 1.2)


def test_the_bias_comes_to_rest() -> None:
    assert [decayed(1.0, share, 0.5) for share in (0.0, 0.5, 0.75, 1.0)] == [1.0, 1.0, 0.5, 0.0]
    model = Decoder(tiny(router=FULL), alone(), VOCAB)
    rate = BiasRate(0.5, model, 1e-3)
    assert rate.act(seen([[1, 1]], share=0.4)) == []
    (action,) = rate.act(seen([[1, 1]], share=0.75))
    assert action.data["new"] == model.moe_layers()[0].router.bias_rate == 5e-4


def test_a_bias_moves_by_the_rate_in_force() -> None:
    still, _ = train(tiny(router=FULL, train__steps=4, control__bias_decay_from=0.0), window_steps=1)
    assert [n["control/bias_rate"] for n in still.numbers] == [7.5e-4, 5e-4, 2.5e-4, 2.5e-4]
    model = Decoder(tiny(router=FULL), alone(), VOCAB)
    model.set_bias_rate(0.0)
    layer = model.moe_layers()[0]
    counts_LE = torch.arange(8).expand(2, 8)
    layer.router.adjust(SimpleNamespace(counts_E=counts_LE[0], statistics_LS=torch.zeros(2, 0), layer=0, num=1))
    assert not layer.router.get_buffer("bias_E").any()


def test_drops_reach_their_target_and_max_vio_falls() -> None:
    changes = {"optim__name": "adamw", "optim__lr": 3e-3, "train__steps": 60, "balance__balance_coef": 1e-4}
    changes |= {"capacity__factor_train": 0.5, "capacity__minimum": 2}
    limits = {"control__capacity_min": 0.5, "control__capacity_max": 4.0, "control__capacity_step": 1.3}
    plain, _ = train(tiny(**changes))
    story, _ = train(tiny(**changes, **limits, control__target_drop=0.05))
    assert late(plain, "drop_fraction") > 0.4
    assert 0.02 < late(story, "drop_fraction") < 0.1
    story, _ = train(tiny(**changes, control__target_max_vio=0.1, control__aux_max=10.0, control__aux_step=4.0))
    assert late(story, "max_vio_mean") < 0.6 * late(plain, "max_vio_mean")


def late(story: Story, name: str) -> float:
    """Mean over the second half of the windows."""
    return float(np.mean([getattr(b, name) for b in story.balances[len(story.balances) // 2 :]]))


def test_off_is_off() -> None:
    story, engine = train(tiny(train__steps=10))
    assert (story.actions, story.numbers) == ([], [{}, {}])
    assert Control(tiny(), engine.model, engine, alone()).state() == {}


SMALL = [
    *("recipe=quickstart", "model=nano", "model.context=32", "model.num_layers=2", "run.id=it", "machine.device=cpu"),
    *("engine=local", "dispatch=local", "router.logit_bias=true", "debug=collapsed_router", "router.noise=none"),
    "router.noise_scale=0.01",
    *("train.steps=12", "train.global_batch=4", "train.micro_batch=4", "train.eval_every=0", "train.eval_batches=1"),
    *("train.sample_tokens=0", "train.checkpoint_every=4", "train.keep_checkpoints=9", "monitor.progress=false"),
    *("monitor.log_every=2", "optim.warmup_steps=1", "control=all", "control.revive_after_steps=6"),
]


def test_a_resumed_run_acts_as_the_one_that_was_not_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken up from step 4: the experts are dead for 4 of 6 steps by then, and two numbers are on their way."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", *SMALL]) == 0
    run = tmp_path / "outputs" / "it"
    rows = read_metrics(run / "metrics.jsonl")
    extra = json.loads((run / "checkpoints" / "step_00000004" / "manifest.json").read_text())["extra"]
    assert set(extra["control"]) == {"aux", "capacity", "revive"}
    for step in (8, 12):
        shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
    assert main(["train", *SMALL]) == 0
    events = [e for e in read_events(run / "events.jsonl") if e.kind == "control"]
    late = [[(e.step, e.message, e.data) for e in events if e.segment == s and e.step > 4] for s in (1, 2)]
    assert late[0] == late[1]
    assert any(data["what"] == "experts" and step == 6 for step, _, data in late[0])
    assert {"balance_coef", "capacity_factor", "experts"} == {data["what"] for _, _, data in late[0]}
    keys = ("train/loss", "control/balance_coef", "control/capacity_factor", "control/restarts")
    again = {row["train/step"]: row for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row}
    for row in rows:
        if "train/loss" in row:
            assert [again[row["train/step"]][key] for key in keys] == [row[key] for key in keys]


RULES = [
    ({"control__aux_min": 1.0}, "control.aux_min", "over control.aux_max"),
    ({"control__capacity_min": 9.0}, "control.capacity_min", "over control.capacity_max"),
    ({"control__target_max_vio": 0.5, "balance__balance_coef": 0.0}, "control.target_max_vio", "never leaves 0"),
    ({"control__target_drop": 0.1}, "control.target_drop", "dropless"),
    (
        {"control__target_drop": 0.1, "capacity__factor_train": 1.0, "capacity__slots_train": 8},
        "control.target_drop",
        "before the factor",
    ),
    ({"control__bias_decay_from": 0.5}, "control.bias_decay_from", "no bias that moves"),
    (
        {"control__revive_after_steps": 5, "train__checkpoint_every": 15},
        "train.checkpoint_every",
        "no multiple of monitor.log_every = 10",
    ),
    ({"debug__collapsed_router": True}, "debug.collapsed_router", "bias of the router's logits"),
]


@pytest.mark.parametrize(("changes", "field", "reason"), RULES)
def test_what_has_nothing_to_act_on_is_refused(changes: dict[str, object], field: str, reason: str) -> None:
    (problem,) = problems_of(raw(**changes))
    assert problem.field == field
    assert reason in problem.reason


def test_routers_without_rows_are_refused() -> None:
    container = raw(control__revive_after_steps=5, debug__collapsed_router=True, experts__allow_noncausal=True)
    container["router"] = {"_target_": "moetrain.moe.routers.expert_choice.ExpertChoiceRouter"}
    fields = [problem.field for problem in problems_of(container)]
    assert fields == ["control.revive_after_steps", "debug.collapsed_router"]
