"""Pretend hosts, made of network namespaces by netns.sh, and a checkout for them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NETNS = str(ROOT / "tests" / "netns.sh")


def need_namespaces() -> None:
    """Skip the test where network namespaces can not be had."""
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed")
    name = f"moetrain-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"network namespaces are not allowed here: {made.stderr.strip()}")


def checkout(folder: Path) -> None:
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


def environment() -> dict[str, str]:
    """Of these tests, without what a launcher has said, one thread a process."""
    told = ("SLURM_", "TORCHELASTIC_", "RANK", "MOETRAIN_")
    return {name: value for name, value in os.environ.items() if not name.startswith(told)} | {"OMP_NUM_THREADS": "1"}
