"""Whole runs whose data is bad for a while: they skip it, go back past it, or stop and say why."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain.cli import main
from moetrain.data import Loader
from moetrain.models.decoder import Decoder
from moetrain.monitor.events import read_events
from moetrain.monitor.jsonl import read_metrics
from moetrain.types import Batch, ModelOutput
from tests.started import TINY, Started, losses, said

STEPS = 14
ALONE = ("engine=local", "dispatch=local", "router=deepseek_v3", "machine.threads=1", "monitor.progress=false")
BACK = ("train.checkpoint_every=4", "health.max_bad_steps=3", f"train.steps={STEPS}")
RUN = Path("outputs/it")


@dataclass
class Plan:
    """Batches of these numbers are bad, on the last rank; the batch ``kills`` kills both ranks, the first time."""

    bad: tuple[int, ...]
    kills: int = -1
    num_seen: int = 0
    now: int = -1


def plant(plan: Plan, put: Callable[[Any, str, Any], None], rank: int) -> None:
    """``put``: setattr, or one that is undone. The batches that were taken come into a file, in order."""
    train, validation, forward = Loader.train, Loader.validation, Decoder.forward

    def taken(self: Loader, step: int, micro: int) -> Batch:
        plan.now = step
        if micro == 0:
            with open(f"batches{rank}.txt", "a") as file:
                file.write(f"{step}\n")
        if step == plan.kills and not Path(f"killed{rank}").exists():
            Path(f"killed{rank}").touch()
            while not all(Path(f"killed{one}").exists() for one in range(2)):  # no rank dies before the other's step 10
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return train(self, step, micro)

    def validated(self: Loader, index: int) -> Batch:
        plan.now = -1
        return validation(self, index)

    def broken(self: Decoder, batch: Batch) -> ModelOutput:
        output = forward(self, batch)
        if plan.now in plan.bad and self.mesh.rank == self.mesh.world_size - 1:
            return replace(output, loss=output.loss * math.nan, lm=output.lm * math.nan)
        return output

    put(Loader, "train", taken)
    put(Loader, "validation", validated)
    put(Decoder, "forward", broken)


def plant_for_good(plan: Plan, rank: int) -> None:
    plant(plan, setattr, rank)


def batches(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "batches0.txt").read_text().split()]


@pytest.fixture
def alone(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``moetrain train`` in this process, with bad batches; the code it ends with."""
    monkeypatch.chdir(tmp_path)
    cache = tmp_path_factory.getbasetemp() / "cache"

    def run(bad: tuple[int, ...], *overrides: str) -> int:
        plant(Plan(bad), monkeypatch.setattr, 0)
        return main(["train", *TINY, *ALONE, f"data.cache={cache}", *overrides])

    return run


def planted(folder: Path, plan: Plan, *overrides: str, world: int) -> tuple[list[int | None], Path]:
    """Exit codes of ranks as processes, and the run folder."""
    folder.mkdir(exist_ok=True)
    with Started(folder, *overrides, world=world, before=partial(plant_for_good, plan)) as ranks:
        return ranks.codes(), ranks.run


def messages(kind: str) -> list[tuple[int, str]]:
    return [(event.step, event.message) for event in read_events(RUN / "events.jsonl") if event.kind == kind]


def test_a_run_goes_back_past_bad_data_and_ends_well(tmp_path: Path) -> None:
    """Two ranks under ZeRO 1, saving beside training; the bad batches 6 to 10 are bad on rank 1 only.

    Steps 7, 8 and 9 are bad, step 8 was being saved: back to step 4, past batch 8, where batches 9 and 10 are too few.
    Then the same again, killed at batch 11, when nothing new was saved, and resumed.
    """
    bad, overrides = (6, 7, 8, 9, 10), (*BACK, "train.async_checkpoint=true", "engine.zero_stage=1")
    codes, run = planted(tmp_path / "whole", Plan(bad), *overrides, world=2)
    assert codes == [0, 0], said(run)
    assert batches(tmp_path / "whole") == [*range(9), *range(9, 19)]
    assert json.loads((run / "rollbacks.json").read_text()) == [{"step": 4, "batches": 5}]
    metrics = [row for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]
    assert [row["train/step"] for row in metrics] == [*range(1, STEPS + 1)]
    assert [int(row["run/segment"]) for row in metrics] == [1] * 4 + [2] * (STEPS - 4)
    assert [math.isnan(row["train/loss"]) for row in metrics] == [step in (5, 6) for step in range(1, STEPS + 1)]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000012", "step_00000014"]
    (alert,) = [event for event in read_events(run / "events.jsonl") if event.kind == "alert"]
    for word in ("3 bad steps in a row", "step 8: the loss is nan; samples 56 to 63", "back to step 4", "step 9"):
        assert word in alert.message

    codes, again = planted(tmp_path / "killed", Plan(bad, kills=11), *overrides, world=2)
    assert codes == [-signal.SIGKILL] * 2, said(again)
    codes, again = planted(tmp_path / "killed", Plan(bad), *overrides, world=2)
    assert codes == [0, 0], said(again)
    assert batches(tmp_path / "killed") == [*range(9), 9, 10, 11, 9, 10, *range(11, 19)]
    np_equal(losses(again), losses(run))


def np_equal(got: dict[int, tuple[float, float]], wanted: dict[int, tuple[float, float]]) -> None:
    assert got.keys() == wanted.keys()
    for step, values in wanted.items():
        torch.testing.assert_close(torch.tensor(got[step]), torch.tensor(values), rtol=0, atol=0, equal_nan=True)


def test_a_run_that_stays_bad_goes_back_further_and_then_stops(alone: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything from batch 9 on: back to step 8; bad again, so back to step 4; bad again."""
    bad = tuple(range(9, 99))
    assert alone(bad, *BACK, "health.max_rollbacks=2", "train.keep_checkpoints=9") == 1
    jumps = json.loads((RUN / "rollbacks.json").read_text())
    assert [jump["step"] for jump in jumps] == [8, 4]
    assert batches(Path()) == [*range(9), 9, 10, 11, 12, 13, 14, 15, 16, 17]
    assert [path.name for path in (RUN / "checkpoints").iterdir()] == ["step_00000004"]
    for text in (capsys.readouterr().err, (RUN / "report.txt").read_text(), messages("alert")[-1][1]):
        assert "THE RUN HAS STOPPED: 3 bad steps in a row:\n  step 5: the loss is nan; samples 120 to 127" in text
        assert "the run has gone back 2 times already" in text


def test_a_run_without_a_checkpoint_stops(alone: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert alone((1, 2, 3), *BACK) == 1
    assert "there is no checkpoint from before them" in capsys.readouterr().err
    assert len(messages("skipped")) == 3


def test_windows_of_which_every_step_was_skipped(
    alone: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first window, one in the middle, a half of one, and the last; controllers and gradient ratios are on. Nothing
    that is kept has a NaN, and the run is as good as its weights.
    """
    kept: list[dict[str, Tensor]] = []
    adapt_routers = Decoder.adapt_routers

    def watched(self: Decoder, moved: bool) -> None:
        adapt_routers(self, moved)
        kept.append({name: value.detach().clone() for name, value in self.state_dict().items()})

    monkeypatch.setattr(Decoder, "adapt_routers", watched)
    options = ("monitor.log_every=2", "control=all", "monitor.gradient_ratio_every=4", "monitor.progress=true")
    assert alone((0, 1, 4, 5, 7, 12, 13), f"train.steps={STEPS}", *options, "train.checkpoint_every=0") == 0
    rows = [row for row in read_metrics(RUN / "metrics.jsonl") if "train/loss" in row]
    nans = [row["train/step"] for row in rows if math.isnan(row["train/loss"])]
    assert (nans, rows[-1]["train/skipped_steps"]) == ([2, 6, 14], 7)
    assert all(value.isfinite().all() for one in kept for value in one.values() if value.is_floating_point())
    for number in (5, 13):
        for name, value in kept[number].items():
            assert torch.equal(value, kept[number - 1][name]), name
    out, errors = capsys.readouterr()
    assert "7 steps were skipped" in out
    assert "step 5 was skipped, samples 32 to 39: the loss is nan" in errors
    for command in (["report", str(RUN)], ["top", str(RUN), "--once"]):
        assert main(command) == 0
