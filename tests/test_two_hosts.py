"""Two hosts with addresses of their own, made of network namespaces: the quick-start runs across them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moetrain.monitor.jsonl import read_metrics

ROOT = Path(__file__).resolve().parents[1]
OVERRIDES = (
    "recipe=quickstart",
    "train.steps=4",
    "train.eval_every=0",
    "train.eval_batches=1",
    "train.checkpoint_every=4",
    "train.sample_tokens=0",
    "optim.warmup_steps=2",
    "monitor.log_every=2",
    "machine.device=cpu",
    "run.id=two-hosts",
)


def _no_namespaces() -> str:
    """Why network namespaces can not be had here, or nothing."""
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    name = f"moetrain-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return "" if made.returncode == 0 else f"network namespaces are not allowed here: {made.stderr.strip()}"


def _checkout(folder: Path) -> None:
    """The launch scripts beside this source, and an environment that is already installed: the one of these tests."""
    shutil.copytree(ROOT / "launch", folder / "launch")
    for name in ("moetrain", "conf", "recipes", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, module in (("python", ""), ("torchrun", "-m torch.distributed.run ")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {module}"$@"\n')
        (programs / name).chmod(0o755)
    with (ROOT / "pyproject.toml").open() as file:
        stamp = subprocess.run(["cksum"], stdin=file, capture_output=True, check=True).stdout
    (folder / ".venv" / "installed").write_bytes(stamp)


def test_the_quick_start_runs_across_two_hosts(tmp_path):
    reason = _no_namespaces()
    if reason:
        pytest.skip(reason)
    _checkout(tmp_path)
    command = [str(ROOT / "tests" / "netns.sh"), "2", str(tmp_path / "launch" / "two_hosts.sh"), *OVERRIDES]
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC_", "RANK"))
    }
    done = subprocess.run(
        command,
        env=env | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "outputs" / "two-hosts"
    (start,) = json.loads((folder / "run.json").read_text())["starts"]
    assert start["world_size"] == 2
    assert [row["train/step"] for row in read_metrics(folder / "metrics.jsonl")] == [2, 4]
    assert sorted(path.name for path in (folder / "logs").iterdir()) == ["rank0.log", "rank1.log"]
    assert "[host 0]" in done.stdout
