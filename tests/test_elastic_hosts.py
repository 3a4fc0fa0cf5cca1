"""Two hosts, of which one is lost: the other goes on alone, on the same samples."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from moetrain.monitor.events import read_events
from tests.hosts import NETNS, checkout, environment, need_namespaces
from tests.started import TINY, Started, losses, rows, said

DROPLESS = ("dispatch=alltoall", "capacity=dropless", "router=mixtral", "balance=sequence")
OVERRIDES = (
    *TINY,
    *DROPLESS,
    *("train.steps=16", "train.global_batch=4", "train.micro_batch=2", "engine.ep_size=4", "run.elastic=true"),
    *("train.checkpoint_every=2", "train.keep_checkpoints=1", "engine.name=local", "engine.zero_stage=0"),
)

QUICK = "last_call_timeout=6,keep_alive_interval=1,keep_alive_max_attempt=8"
"""A host is missed after 8 s instead of 15, and 6 s are waited for others: two hosts may come as far apart."""


def test_the_host_that_is_left_goes_on_alone(tmp_path: Path) -> None:
    """kill -9 of torchrun on host 1 before step 5; its rank must end by itself."""
    need_namespaces()
    checkout(tmp_path, checks=False, agent="tests.agent")
    cache = f"data.cache={tmp_path / 'cache'}"
    (tmp_path / "whole").mkdir()
    with Started(tmp_path / "whole", *OVERRIDES, cache, world=1) as whole:
        assert whole.codes() == [0], said(whole.run)
    run = tmp_path / "outputs" / "it"
    command = [NETNS, "2", str(tmp_path / "launch" / "two_hosts.sh"), *OVERRIDES, cache]
    env = environment() | {"NODES": "1:2", "RDZV_CONF": QUICK, "HOLD_STEP": "4", "HOLD_FILE": str(tmp_path / "go")}
    hosts = subprocess.Popen(
        command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        deadline = time.monotonic() + 280
        while len(rows(run)) < 4:
            assert hosts.poll() is None, hosts.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        rank = _rank_of_host_1(tmp_path)
        os.kill(int((tmp_path / "agent1").read_text()), signal.SIGKILL)
        deadline = time.monotonic() + 5
        while _runs(rank):
            assert time.monotonic() < deadline, "the rank has outlived its torchrun"
            time.sleep(0.05)
        (tmp_path / "go").touch()
        out = hosts.communicate(timeout=280)[0]
    finally:
        hosts.terminate()
        hosts.wait()
    assert "elastic: ranks 2 -> 1, ep_size 2 -> 1, accumulation 1 -> 2" in out, out
    starts = json.loads((run / "run.json").read_text())["starts"]
    assert [start["world_size"] for start in starts] == [2, 1]
    events = read_events(run / "events.jsonl")
    _, elastic = [event for event in events if event.kind == "elastic"]
    (resume,) = [event for event in events if event.kind == "resume"]
    assert elastic.step == resume.step
    assert resume.step >= 2
    got, expected = losses(run), losses(whole.run)
    assert sorted(got) == list(range(1, 17))
    for step, (loss, norm) in expected.items():
        assert got[step] == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-4))


def _runs(pid: int) -> bool:
    """A process that nobody has waited for has no command line."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    return False


def _rank_of_host_1(folder: Path) -> int:
    """The one process there with ``-m tests.steady`` on its command line that works below ``folder``."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            told = (entry / "environ").read_bytes().split(b"\0")
            below = any(str(folder).encode() in text for text in words)
            if below and b"NODE_RANK=1" in told and words[words.index(b"-m") + 1] == b"tests.steady":
                found.append(int(entry.name))
    (pid,) = found
    return pid
