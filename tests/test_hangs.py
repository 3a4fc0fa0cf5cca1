"""A rank that hangs, is stopped, is killed or leaves a collective out ends the job, with a report that names it."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moetrain.compose import compose
from moetrain.config import Config
from moetrain.health import dump, watchdog
from moetrain.health.watchdog import HUNG
from moetrain.monitor.events import read_events
from moetrain.train import main
from moetrain.trainer import Trainer
from tests.ranks import PRELOAD
from tests.started import held_port

TIMEOUT_S = 15
STEP = 3
SMALL = [
    *("recipe=quickstart", "model=nano", "model.context=16", "model.num_layers=2", "engine=local", "dispatch=alltoall"),
    *("train.steps=100000", "train.global_batch=12", "train.micro_batch=1", "train.sample_tokens=0"),
    *("train.eval_every=0", "optim.warmup_steps=1", "monitor.progress=false", "monitor.log_every=1"),
    *("machine.device=cpu", f"machine.timeout_s={TIMEOUT_S}", "health.preflight=false", "run.id=it"),
]


@dataclass(frozen=True)
class Fault:
    """What happens to rank ``victim`` in step STEP."""

    act: Callable[[Trainer], None]
    victim: int
    world: int
    overrides: tuple[str, ...] = ()


def sleep(_: Trainer) -> None:
    time.sleep(600)


def stop(_: Trainer) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def kill(_: Trainer) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave_out(_: Trainer) -> None:
    """The next all-reduce of this rank does not take place."""
    usual = dist.all_reduce

    def none(*args: Any, **kwargs: Any) -> None:
        dist.all_reduce = usual

    dist.all_reduce = none


def fail(_: Trainer) -> None:
    raise ValueError("planted")


def stall(_: Trainer) -> None:
    """The storage of the run folder answers this rank no more."""

    def never(*_: object) -> None:
        time.sleep(600)

    dump.write = dump.read_all = never  # type: ignore[assignment]
    watchdog.GRACE_S = 1.0
    time.sleep(600)


def flip(trainer: Trainer) -> None:
    """The lowest bit of one weight."""
    trainer.model.get_parameter("norm.weight").data.view(torch.int32)[0] ^= 1


HANGS = {
    "sleeps": Fault(sleep, victim=2, world=4, overrides=("engine.ep_size=2",)),
    "is_stopped": Fault(stop, victim=1, world=2),
    "is_killed": Fault(kill, victim=1, world=2),
    "leaves_one_out": Fault(leave_out, victim=1, world=3),
    "stalls": Fault(stall, victim=1, world=2),
    "fails": Fault(fail, victim=1, world=2),
}
FLIP = Fault(flip, victim=1, world=2, overrides=("health.replicas_every=100", "train.checkpoint_every=2"))


def as_rank(rank: int, port: int, fault: Fault, folder: str, config: Config) -> None:
    os.chdir(folder)
    os.dup2(os.open(f"rank{rank}.err", os.O_CREAT | os.O_WRONLY), 2)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(fault.world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    usual = Trainer._step

    def step(self: Trainer, number: int) -> float:
        if rank == fault.victim and number == STEP - 1:
            self.watchdog.beat("step", STEP)
            fault.act(self)
        return usual(self, number)

    Trainer._step = step  # type: ignore[method-assign]
    sys.exit(main(config))


@dataclass
class Job:
    """Exit codes are None where the test had to end the rank."""

    fault: Fault
    folder: Path
    ranks: list[ForkServerProcess]
    codes: list[int | None]

    @property
    def report(self) -> str:
        return (self.folder / "outputs" / "it" / "hang" / "report.txt").read_text()

    def dump(self, rank: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "outputs" / "it" / "hang" / f"rank_{rank}.json").read_text())
        return found


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """All faults at once: most of the time is waiting."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    cache, jobs, held = f"data.cache={tmp_path_factory.mktemp('cache')}", {}, []
    for name, fault in {**HANGS, "flips": FLIP}.items():
        folder, (one_held, port) = tmp_path_factory.mktemp(name), held_port()
        held.append(one_held)
        config = compose([*SMALL, cache, *fault.overrides], fault.world)
        args = [(rank, port, fault, str(folder), config) for rank in range(fault.world)]
        ranks = [context.Process(target=as_rank, args=one, daemon=True) for one in args]
        for process in ranks:
            process.start()
        jobs[name] = Job(fault, folder, ranks, [])
    deadline = time.monotonic() + 250
    for job in jobs.values():
        for rank, process in enumerate(job.ranks):
            if job.fault.act is not stop or rank != job.fault.victim:
                process.join(timeout=max(0.0, deadline - time.monotonic()))
            job.codes.append(process.exitcode)
    for job in jobs.values():
        for process in job.ranks:
            process.kill()
            process.join()
    for one_held in held:
        one_held.close()
    return jobs


@pytest.mark.parametrize("name", HANGS)
def test_the_job_ends_and_the_report_names_step_rank_and_collective(jobs: dict[str, Job], name: str) -> None:
    job = jobs[name]
    victim = job.fault.victim
    assert all(code == HUNG for rank, code in enumerate(job.codes) if rank != victim)
    assert f"TRAINING HAS STOPPED at step {STEP}: ranks [{victim}] have not come to gloo:" in job.report
    stderr = "".join((job.folder / f"rank{rank}.err").read_text() for rank in range(job.fault.world))
    assert stderr.count("TRAINING HAS STOPPED") == 1
    assert not list((job.folder / "outputs" / "it" / "hang").glob("report.txt.*"))


def test_a_rank_that_sleeps_tells_where_and_its_peers_wait_for_it_alone(jobs: dict[str, Job]) -> None:
    job = jobs["sleeps"]
    assert job.codes[2] == HUNG
    assert "not come to it: ranks [2, 3]" in job.report
    assert re.search(
        r"ranks \[3\] wait in gloo:all_to_all .* of the group \[2, 3\]; not come to it: ranks \[2\]", job.report
    )
    assert re.search(r"rank 2 .* step 3, step, no sign of life for \d+ s, in .*test_hangs.py:\d+ sleep", job.report)
    assert job.dump(2)["error"] == ""
    assert "Timed out" in job.dump(0)["error"]


@pytest.mark.parametrize("name", ["is_stopped", "is_killed"])
def test_a_rank_without_a_word_is_silent(jobs: dict[str, Job], name: str) -> None:
    assert "rank 1: silent" in jobs[name].report
    assert jobs["is_killed"].codes[1] == -signal.SIGKILL


def test_a_rank_whose_storage_hangs_ends_too(jobs: dict[str, Job]) -> None:
    job = jobs["stalls"]
    assert job.codes == [HUNG, HUNG]
    assert "rank 1 hangs in step 3, step; " in (job.folder / "rank1.err").read_text()


def test_a_rank_that_fails_tells_why(jobs: dict[str, Job]) -> None:
    assert "ValueError: planted" in jobs["fails"].report
    assert jobs["fails"].codes[1] == 1


def test_a_bit_that_flips_stops_the_run_before_it_is_saved(jobs: dict[str, Job]) -> None:
    """In step 3; step 2 was saved, step 4 is not."""
    run = jobs["flips"].folder / "outputs" / "it"
    assert jobs["flips"].codes == [1, 1]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000002"]
    (alarm,) = [event for event in read_events(run / "events.jsonl") if event.kind == "alert"]
    assert alarm.step == 4
    assert "weight/norm.weight: ranks [0] against ranks [1]" in alarm.message
    assert not (run / "hang").exists()
