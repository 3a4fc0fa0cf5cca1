"""A process whose torchrun is killed ends too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PARENT = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]]).wait()"
CHILD = """
import importlib.util, time
spec = importlib.util.spec_from_file_location("orphan", {path!r})
orphan = importlib.util.module_from_spec(spec)
spec.loader.exec_module(orphan)
orphan.die_with_torchrun()
print("ready", flush=True)
time.sleep(100)
print("alive", flush=True)
"""
ORPHAN = str(Path(__file__).parents[1] / "moetrain" / "health" / "orphan.py")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has PR_SET_PDEATHSIG")
def test_a_rank_dies_with_its_torchrun() -> None:
    env = os.environ | {"TORCHELASTIC_RUN_ID": "x"}
    command = [sys.executable, "-c", PARENT, CHILD.format(path=ORPHAN)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        os.kill(parent.pid, signal.SIGKILL)
        assert parent.stdout.read() == "", "it went on"
