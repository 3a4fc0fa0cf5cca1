"""Slurm's time runs out: the job saves, leaves and is queued again, on two hosts with stand-ins for Slurm."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from moetrain.monitor.events import read_events
from tests.hosts import NETNS, checkout, environment, need_namespaces
from tests.started import TINY, rows

JOB = "271828"
SRUN = f"""#!/usr/bin/env bash
while [ "${{1#--}}" != "$1" ]; do shift; done
exec {NETNS} 2 bash -c 'SLURM_NODEID=$NODE_RANK SLURMD_NODENAME=10.78.0.$((NODE_RANK + 1)) exec "$@"' node "$@"
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in show) echo 10.78.0.1; echo 10.78.0.2 ;; requeue) echo "requeue $2" >>"$CALLS" ;; esac
"""
SLURM = {"SLURM_JOB_ID": JOB, "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[0-1]", "INTERFACE": "eth0"}
OVERRIDES = (*TINY, "run.id=null", "engine=local", "train.steps=24", "train.checkpoint_every=0")


def submit(folder: Path) -> subprocess.Popen[str]:
    """The job, as Slurm starts it; if it comes past step 3, it waits before it for the request to leave."""
    stubs = folder / "stubs"
    stubs.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    env = environment() | SLURM | {"SLURM_SUBMIT_DIR": str(folder), "CALLS": str(folder / "calls")}
    env |= {"HOLD_STEP": "2", "HOLD_FILE": str(folder / f"moetrain-{JOB}.stop")}
    return subprocess.Popen(
        ["bash", str(folder / "launch/slurm/train.sbatch"), *OVERRIDES, f"data.cache={folder / 'cache'}"],
        env=env | {"PATH": f"{stubs}:{env['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_job_whose_time_is_over_is_queued_again_and_goes_on(tmp_path: Path) -> None:
    need_namespaces()
    checkout(tmp_path, checks=False)
    run = tmp_path / "outputs" / JOB
    job = submit(tmp_path)
    try:
        deadline = time.monotonic() + 280
        while len(rows(run)) < 2:
            assert job.poll() is None, job.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(job.pid, signal.SIGUSR2)  # the batch shell alone, as --signal=B:USR2@300 has it
        out = job.communicate(timeout=280)[0]
        assert job.returncode == 0, out
        assert (tmp_path / "calls").read_text() == f"requeue {JOB}\n"
        assert (run / "requeue").exists()
        left = max(int(row["train/step"]) for row in rows(run))
        assert left in (2, 3)
        job = submit(tmp_path)
        out = job.communicate(timeout=280)[0]
        assert job.returncode == 0, out
    finally:
        job.terminate()
        job.wait()
    assert "Training is done" in out
    assert (tmp_path / "calls").read_text() == f"requeue {JOB}\n", "a job that is done is not queued again"
    assert [int(row["train/step"]) for row in rows(run) if "train/loss" in row] == list(range(1, 25))
    leave, resume = read_events(run / "events.jsonl")
    assert (leave.kind, resume.kind, resume.step) == ("leave", "resume", left)
    assert not list(tmp_path.glob("*.stop"))


STUB = "#!/usr/bin/env bash\ntouch started\nwhile [ ! -e end ]; do sleep 0.05; done\n"


@pytest.mark.parametrize(("ends", "requeued"), [("rm *.stop", True), ("true", False), ("rm *.stop; exit 3", False)])
def test_only_what_was_saved_is_queued_again(ends: str, requeued: bool, tmp_path: Path) -> None:
    """srun ends after the signal: with the request honoured, without having seen it, or with an error."""
    (tmp_path / "stubs").mkdir()
    for name, text in (("srun", STUB + ends + "\n"), ("scontrol", SCONTROL), ("python", "#!/bin/sh\n")):
        (tmp_path / "stubs" / name).write_text(text)
        (tmp_path / "stubs" / name).chmod(0o755)
    env = environment() | SLURM | {"SLURM_SUBMIT_DIR": str(tmp_path), "CALLS": str(tmp_path / "calls")}
    script = Path(__file__).parents[1] / "launch/slurm/train.sbatch"
    job = subprocess.Popen(["bash", str(script)], env=env | {"PATH": f"{tmp_path / 'stubs'}:{env['PATH']}"})
    try:
        _wait_for(tmp_path / "started")
        os.kill(job.pid, signal.SIGUSR2)
        _wait_for(tmp_path / f"moetrain-{JOB}.stop")
        (tmp_path / "end").touch()
        assert job.wait(timeout=200) == (3 if "exit 3" in ends else 0)
    finally:
        (tmp_path / "end").touch()
        job.terminate()
        job.wait()
    assert (tmp_path / "calls").exists() == requeued
    assert not list(tmp_path.glob("*.stop"))


def _wait_for(file: Path) -> None:
    deadline = time.monotonic() + 200
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
