"""DeepSpeed in one process that nobody launched: it works, says nothing, and trains as the local engine does."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

CHILD = """
import json, warnings
from tests.engine_runs import ONE, Case, Run, engine_of, train

runs = []
for case in (Case("local", optim="adamw"), *(Case("deepspeed", stage, optim="adamw") for stage in range(4))):
    engine = engine_of(case, ONE)
    run = train(engine, ONE, 1, range(3), Run())
    from tests.toy import batch_of, sequences
    runs.append([run.losses, run.norms, float(engine.evaluate(batch_of(sequences(9, 4))).lm)])
engine_of(Case("deepspeed", 1, optim="adamw", dtype="bf16"), ONE)
print(json.dumps(runs))
"""


def test_one_process_without_torchrun_is_quiet_and_right() -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, env=env, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    local, *stages = json.loads(done.stdout)
    for losses, norms, lm in stages:
        assert losses == pytest.approx(local[0], rel=1e-5)
        assert norms == pytest.approx(local[1], rel=1e-5)
        assert lm == pytest.approx(local[2], rel=1e-5)
