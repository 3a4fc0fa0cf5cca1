"""Three steps, a checkpoint, another process, three steps more: to the bit what six steps on end are."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine_runs import Case, Run, load_and_train, train_and_save
from tests.ranks import run_ranks

WORLD = 4
ENGINES = [("local", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]
CASES = [Case(*engine, 2, optim="adamw") for engine in ENGINES]
CASES += [
    Case(*engine, 2, dtype="bf16", optim="adamw") for engine in (("local", 0), ("deepspeed", 1), ("deepspeed", 3))
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, list[tuple[Run, Run]]]:
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    whole = run_ranks(WORLD, train_and_save, CASES, folder, timeout=200.0)
    resumed = run_ranks(WORLD, load_and_train, CASES, folder, timeout=200.0)
    return {case: [(whole[rank][i], resumed[rank][i]) for rank in range(WORLD)] for i, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(runs: dict[Case, list[tuple[Run, Run]]], case: Case) -> None:
    for whole, resumed in runs[case]:
        assert resumed.losses == whole.losses[3:]
        assert resumed.norms == whole.norms[3:]
        assert resumed.weights.keys() == whole.weights.keys()
        for name, wanted in whole.weights.items():
            assert np.array_equal(resumed.weights[name], wanted), name
