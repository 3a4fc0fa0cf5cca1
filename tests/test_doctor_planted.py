"""Faults planted in small runs are named; a run without one is not. recipes/doctor.md has the rates over many."""

from __future__ import annotations

import pytest

from moetrain.monitor.jsonl import STEP
from moetrain.monitor.rounds import Rounds
from moetrain.monitor.signs import facts_of
from tests.planted import Case, config_of, train
from tests.planted_cases import FAULTS, healthy


@pytest.mark.parametrize("case", FAULTS, ids=lambda case: case.name.replace(" ", "-"))
def test_a_planted_fault_is_named(case: Case) -> None:
    config = config_of(case)
    rounds = Rounds(facts_of(config, case.ep_size))
    said = []
    for row in train(case, config):
        said += [news.diagnosis.name for news in rounds.visit(int(row[STEP]), row)]
        if case.expected in said:
            return
    pytest.fail(f"only {said} were said")


def test_nothing_is_said_of_a_run_without_a_fault() -> None:
    case = healthy("mixtral")
    config = config_of(case)
    rounds = Rounds(facts_of(config, case.ep_size))
    assert [news for row in train(case, config) for news in rounds.visit(int(row[STEP]), row)] == []
