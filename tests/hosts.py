"""Pretend hosts, made of network namespaces by netns.sh, and a checkout for them."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NETNS = str(ROOT / "tests" / "netns.sh")
CLONE_NEWNET = 0x40000000
"""linux/sched.h"""

STEADY = 'for word; do shift; [ "$word" = moetrain ] && word=tests.steady; set -- "$@" "$word"; done\n'
"""Shell: ``-m moetrain`` becomes ``-m tests.steady``."""


def need_namespaces() -> None:
    """Skip the test where network namespaces can not be had."""
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed")
    name = f"moetrain-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"network namespaces are not allowed here: {made.stderr.strip()}")


def checkout(folder: Path, *, checks: bool = True, agent: str = "torch.distributed.run") -> None:
    """The launch scripts beside this source, and an environment that is already installed: the one of these tests.

    checks: otherwise ``moetrain check``, which the scripts ask first, is not called: a quarter of a minute less.
    agent: the module that is torchrun; whatever it is, it starts ``tests.steady`` for ``moetrain``.
    """
    shutil.copytree(ROOT / "launch", folder / "launch")
    for name in ("moetrain", "conf", "tests", "recipes", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, module in (("python", ""), ("torchrun", f"-m {agent} ")):
        (programs / name).write_text(f'#!/bin/sh\n{STEADY if module else ""}exec {sys.executable} {module}"$@"\n')
        (programs / name).chmod(0o755)
    if not checks:
        (programs / "python").write_text("#!/bin/sh\n")
    with (ROOT / "pyproject.toml").open() as file:
        stamp = subprocess.run(["cksum"], stdin=file, capture_output=True, check=True).stdout
    (folder / ".venv" / "installed").write_bytes(stamp)


@contextmanager
def two_spaces() -> Iterator[tuple[str, str]]:
    """Names of two namespaces joined by one cable: 10.79.0.1 and 10.79.0.2, each on its eth0. For ``enter``."""
    spaces = f"moetrain-{os.getpid()}-0", f"moetrain-{os.getpid()}-1"
    try:
        for space in spaces:
            _ip("netns", "add", space)
        _ip("link", "add", "eth0", "netns", spaces[0], "type", "veth", "peer", "name", "eth0", "netns", spaces[1])
        for number, space in enumerate(spaces, 1):
            _ip("-n", space, "address", "add", f"10.79.0.{number}/24", "dev", "eth0")
            link(space, "up", "lo")
            link(space, "up")
        yield spaces
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


def link(space: str, state: str, device: str = "eth0") -> None:
    """state: up, or down."""
    _ip("-n", space, "link", "set", device, state)


def enter(space: str) -> None:
    """This process lives in that namespace from now on; while it has only one thread."""
    with open(f"/run/netns/{space}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def environment() -> dict[str, str]:
    """Of these tests, without what a launcher has said, one thread a process."""
    told = ("SLURM_", "TORCHELASTIC_", "RANK", "MOETRAIN_")
    return {name: value for name, value in os.environ.items() if not name.startswith(told)} | {"OMP_NUM_THREADS": "1"}
