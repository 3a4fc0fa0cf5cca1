"""What an offline run of wandb holds, read with wandb's own tool."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def wandb_records(folder: Path) -> list[dict[str, Any]]:
    """Every record of the run in ``folder``, in order."""
    return [json.loads(line) for line in _inspect("--json", str(folder)).splitlines()]


def wandb_summary(folder: Path) -> dict[str, Any]:
    """What a table of runs would show of it."""
    summary: dict[str, Any] = json.loads(_inspect("--summary", "--json", str(folder)))["summary"]
    return summary


def _inspect(*words: str) -> str:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
