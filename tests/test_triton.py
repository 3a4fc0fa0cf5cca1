"""The Triton kernels in Triton's interpreter, on a CPU. What a GPU makes of them is for the benchmark to check."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from moetrain.ops.triton_swiglu import has_triton

CASES = ("random", "no weights", "empty expert", "all to one", "dropped", "ragged", "no rows", "padded")
TOLERANCE = {"torch.float32": 1e-6, "torch.bfloat16": 3e-2}
"""Of the norm. The interpreter cuts numbers off to bf16 where a GPU rounds them."""


@pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed: there is none but for Linux on x86-64"
)
def test_triton_experts_and_their_gradients_equal_autograds() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.triton_cases", *CASES],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    errors: dict[str, list[float]] = json.loads(done.stdout)
    assert {name.split(", ")[0] for name in errors} == set(CASES)
    assert len(errors) == 5 * (len(CASES) + 2) - 1
    wrong = {name: pair for name, pair in errors.items() if not pair[0] <= TOLERANCE[name.split(", ")[1]] * pair[1]}
    assert not wrong, "error and norm of the reference"


def test_triton_is_not_chosen_where_there_is_no_device_for_it() -> None:
    assert has_triton() == (find_spec("triton") is not None and torch.cuda.is_available())
