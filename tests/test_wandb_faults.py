"""The real wandb, dead, mute or out of disk: training puts its numbers away as fast as ever and ends in time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

# argv: the folder, the mode, and what happens: "killed" its service is, "full" the disk, "mute" the server.
WRITER = """
import os, resource, signal, sys, time
from pathlib import Path
from moetrain.monitor.wandb import WandbLogger, WandbSettings
folder, mode, fault = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
if fault == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
logger = WandbLogger(WandbSettings(mode, "moetrain-tests", None, "run-1", folder, {}, 3.0, 3.0))

def put(step):
    start = time.perf_counter()
    logger.scalars(step, step, {f"balance/number_{i}": step + i for i in range(30)})
    return time.perf_counter() - start

def children():
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rsplit(")", 1)[1].split()[1]) == os.getpid():
                yield int(stat.parent.name)
        except OSError:
            pass

put(1)
if fault != "mute":
    until = time.monotonic() + 120
    while not list(folder.glob("wandb/offline-run-*/*.wandb")):
        assert time.monotonic() < until
        time.sleep(0.05)
if fault == "killed":
    for child in children():
        os.kill(child, signal.SIGKILL)
late = 0
for step in range(2, 202):
    late += put(step) > 0.25
    time.sleep(0.002)
start = time.monotonic()
outcome = logger.close()
print(f"{late} {time.monotonic() - start} {outcome.sent + outcome.lost} {outcome.failure}", flush=True)
"""


@pytest.fixture
def mute_server():
    """Takes connections and never says a word."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(("mode", "fault"), [("offline", "killed"), ("offline", "full"), ("online", "mute")])
def test_training_does_not_notice(mode: str, fault: str, tmp_path: Path, mute_server: str) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    account = {"WANDB_BASE_URL": mute_server, "WANDB_API_KEY": "a" * 40} if mode == "online" else {}
    start = time.monotonic()
    command = [sys.executable, "-c", WRITER, str(tmp_path), mode, fault]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=clean | account, check=False)
    assert done.returncode == 0, done.stderr
    late, closing, records, failure = done.stdout.split(maxsplit=3)
    assert int(late) < 20, "calls do not wait for wandb; a busy machine may hold up some"
    assert float(closing) < 60.0, "wandb's own limits are minutes"
    assert int(records) == 201, "each is counted, as sent or as lost"
    assert time.monotonic() - start < 150, "nor does the process hang when it ends"
    if fault == "full":  # wandb itself says nothing of that
        assert sum(file.stat().st_size for file in tmp_path.glob("wandb/offline-run-*/*.wandb")) <= 20_000
    else:
        assert failure.strip() != "None"
