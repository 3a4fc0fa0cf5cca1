"""What a rank runs on, in words."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """The model of this machine's processor where Linux tells it, else its architecture."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()
