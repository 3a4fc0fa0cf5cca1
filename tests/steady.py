"""``python -m tests.steady``: moetrain as it is, but for what is chosen by a measured time or is a race with a test."""

from __future__ import annotations

import os
import runpy
import time
from pathlib import Path
from typing import Any

from moetrain import resume
from moetrain.health import leave
from moetrain.ops.kernels import has_onednn
from moetrain.trainer import Trainer


def same_products() -> None:
    """Runs that are compared to the bit may not differ in which matrix product was the faster one when they began."""
    resume.fastest_gemm = lambda device: "onednn" if has_onednn() else "torch"


def hold(step: int, file: Path) -> None:
    """No rank takes the step of that number, from 0, before the file is there. A request to leave is seen at once."""
    usual = Trainer._step
    leave.POLL_S = 0.0

    def held(self: Trainer, number: int) -> Any:
        while number == step and not file.exists():
            time.sleep(0.02)
        return usual(self, number)

    Trainer._step = held  # type: ignore[method-assign]


if __name__ == "__main__":
    same_products()
    if "HOLD_STEP" in os.environ:
        hold(int(os.environ["HOLD_STEP"]), Path(os.environ["HOLD_FILE"]))
    runpy.run_module("moetrain", run_name="__main__", alter_sys=True)
