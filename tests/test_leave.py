"""A run is asked to leave: all ranks save the same step and end with code 0, and the next start goes on as if nothing
had been.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import moetrain.checkpoint.store as store
from moetrain.cli import main
from moetrain.engine.local import LocalEngine
from moetrain.health import leave
from moetrain.monitor.events import read_events
from moetrain.trainer import Trainer
from tests.started import TINY, Started, losses, rows, said

STEPS = 12
FIRST, SECOND = 2, 8
"""Before these steps, from 0, something happens to the ranks."""
ALONE = [*TINY, "engine=local", "dispatch=local", "train.steps=6", "monitor.progress=false", "train.global_batch=4"]
ALONE += ["train.checkpoint_every=0", "machine.threads=1"]
RUN = Path("outputs/it")


def ask(number: int = signal.SIGTERM) -> None:
    """This process, until it has heard it."""
    usual, heard = leave.Leave._hear, threading.Event()

    def hear(self: leave.Leave, number: signal.Signals) -> None:
        usual(self, number)
        heard.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leave.Leave, "_hear", hear)
        os.kill(os.getpid(), number)
        assert heard.wait(200)


def at_step(step: int, victim: int, what: Callable[[], None], rank: int) -> None:
    """Before step ``step``, from 0, it happens on the rank ``victim``."""
    usual = Trainer._step

    def changed(self: Trainer, number: int) -> float:
        if (rank, number) == (victim, step):
            what()
        return usual(self, number)

    Trainer._step = changed  # type: ignore[method-assign]


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def test_two_ranks_leave_together_and_go_on_to_the_bit(tmp_path: Path) -> None:
    """Under DeepSpeed's ZeRO 1. SIGUSR2 to rank 1; then rank 0 hangs, rank 1 is asked once and leaves when it is asked
    again; then the third start goes on from what the first one saved.
    """
    cache = f"data.cache={tmp_path / 'cache'}"
    overrides = (f"train.steps={STEPS}", "train.checkpoint_every=0", cache)
    (tmp_path / "whole").mkdir()
    with Started(tmp_path / "whole", *overrides) as whole:
        assert whole.codes() == [0, 0], said(whole.run)
    assert not (whole.run / "requeue").exists()
    assert not (whole.run / "checkpoints").exists()

    with Started(tmp_path, *overrides, before=partial(at_step, FIRST, 1, partial(ask, signal.SIGUSR2))) as ranks:
        assert ranks.codes() == [0, 0], said(ranks.run)
    run = ranks.run
    left = max(losses(run))
    assert left == FIRST + 1
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{left:08d}"]
    marker = json.loads((run / "requeue").read_text())
    assert (marker["step"], marker["reason"]) == (left, "rank 1 got SIGUSR2")
    assert f"Training was left after step {left} of {STEPS}" in said(run)
    assert f"left after step {left} (rank 1 got SIGUSR2); the same command with run.id=it goes on" in said(run)
    (event,) = [event for event in read_events(run / "events.jsonl") if event.kind == "leave"]
    assert (event.step, event.message) == (left, "rank 1 got SIGUSR2")

    with Started(tmp_path, *overrides, before=partial(at_step, SECOND, 0, stop)) as ranks:
        ranks.wait_for_step(SECOND)
        assert not (run / "requeue").exists()
        ranks.signal(1, signal.SIGTERM)
        time.sleep(leave.SAME_S + 0.2)
        assert ranks.ranks[1].exitcode is None
        deadline = time.monotonic() + 200
        while ranks.ranks[1].exitcode is None and time.monotonic() < deadline:  # it may not have heard the first yet
            with contextlib.suppress(ProcessLookupError):
                ranks.signal(1, signal.SIGTERM)
            ranks.ranks[1].join(0.2)
        assert ranks.ranks[1].exitcode == 128 + signal.SIGTERM

    with Started(tmp_path, *overrides) as ranks:
        assert ranks.codes() == [0, 0], said(run)
    assert losses(run) == losses(whole.run)
    assert [event.kind for event in read_events(run / "events.jsonl")] == ["leave", "resume", "resume"]


@pytest.fixture
def alone(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``moetrain train`` in this process; the code it ends with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(leave, "POLL_S", 0.0)
    cache = tmp_path_factory.getbasetemp() / "cache"
    return lambda *overrides: main(["train", *ALONE, f"data.cache={cache}", *overrides])


def at_call(number: int, what: Callable[[], None], monkeypatch: pytest.MonkeyPatch, of: type, name: str) -> list[str]:
    """Before the ``number``-th call of ``of.name``, do it. Returns a list that grows by each call."""
    usual, calls = getattr(of, name), []

    def changed(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == number:
            what()
        return usual(*args, **kwargs)

    monkeypatch.setattr(of, name, changed)
    return calls


def saved() -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (RUN / "checkpoints").glob("step_*"))


def reason() -> str:
    marker = json.loads((RUN / "requeue").read_text())
    assert marker["step"] == saved()[-1]
    return str(marker["reason"])


def test_what_was_there_is_heard_and_put_back(alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(number) for number in leave.SIGNALS]
    at_call(3, lambda: ask(signal.SIGINT), monkeypatch, Trainer, "_step")
    assert alone() == 0
    assert [signal.getsignal(number) for number in leave.SIGNALS] == before
    assert (saved(), reason()) == ([3], "rank 0 got SIGINT")


def test_a_signal_that_comes_twice_at_once_is_one_request(alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under Slurm, which signals torchrun and its workers."""
    monkeypatch.setattr(leave, "SAME_S", 200.0)

    def twice() -> None:
        ask()
        ask()

    at_call(2, twice, monkeypatch, Trainer, "_step")
    assert alone() == 0
    assert saved() == [2]


@pytest.mark.parametrize("named", [False, True])
def test_a_file_asks_and_is_gone_when_it_was_heard(
    named: bool, alone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "elsewhere" if named else RUN / "STOP"
    monkeypatch.setenv(leave.ANOTHER_FILE, str(tmp_path / "elsewhere"))
    at_call(4, file.touch, monkeypatch, Trainer, "_step")
    assert alone() == 0
    assert (saved(), reason()) == ([4], f"{file} was there")
    assert not file.exists()
    assert alone() == 0
    assert not (RUN / "requeue").exists()
    assert [row["train/step"] for row in rows(RUN)] == [1, 2, 3, 4, 5, 6]


def test_files_are_looked_for_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(leave, "monotonic", lambda: now[0])
    one = leave.Leave(0, tmp_path)
    assert not one.asked
    (tmp_path / "STOP").touch()
    now[0] += leave.POLL_S - 0.01
    assert not one.asked
    now[0] += 0.02
    assert one.asked
    assert not leave.Leave(1, tmp_path).asked, "rank 0 alone looks"


def test_a_save_is_asked_for(alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    at_call(3, (RUN / "SAVE").touch, monkeypatch, Trainer, "_step")
    assert alone() == 0
    assert saved() == [3]
    assert not (RUN / "SAVE").exists()
    assert len(rows(RUN)) == 6


def test_a_request_within_an_evaluation_ends_it(alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the global batch of two micro-batches that it comes in."""
    evaluated = at_call(3, ask, monkeypatch, LocalEngine, "evaluate")
    assert alone("train.eval_every=2", "train.eval_batches=50") == 0
    assert saved() == [2]
    assert not any("validation/lm_loss" in row for row in rows(RUN))
    assert len(evaluated) == 4


def test_a_request_within_the_last_evaluation_loses_no_step(alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    at_call(2, ask, monkeypatch, LocalEngine, "evaluate")
    assert alone("train.eval_batches=50", "train.checkpoint_every=6") == 0
    assert saved() == [6]
    assert not (RUN / "requeue").exists(), "it is done"


def test_a_request_within_a_save_needs_no_second_one(alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    at_call(1, ask, monkeypatch, store.Saver, "save")
    assert alone("train.checkpoint_every=2") == 0
    assert saved() == [2]


def test_a_window_that_is_cut_short_is_shown_but_steers_nothing(alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    at_call(5, ask, monkeypatch, Trainer, "_step")
    steered = []
    monkeypatch.setattr(Trainer, "_steer", lambda self, done, means: steered.append(done))
    assert alone("monitor.log_every=3") == 0
    assert [row["train/step"] for row in rows(RUN)] == [3, 5]
    assert steered == [3]


def test_a_full_disk_is_no_clean_leave(
    alone: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store, "write", full)
    at_call(2, (RUN / "STOP").touch, monkeypatch, Trainer, "_step")
    assert alone() == 1
    assert re.search("the run was left, but its last checkpoint step_00000002 .*No space left", capfd.readouterr().err)
    assert (RUN / "STOP").exists()
    assert not (RUN / "requeue").exists()
