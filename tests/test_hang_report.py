"""Who waits for whom: what is read out of what ranks leave behind, and what is remembered of collectives."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from moetrain.health import dump, flight, hang
from moetrain.health.dump import Dump
from moetrain.health.flight import Collective, Flight

WORLD, FIRST_EP, SECOND_EP = "0", "1", "2"
RANKS = {WORLD: [0, 1, 2, 3], FIRST_EP: [0, 1], SECOND_EP: [2, 3]}


def reduce(number: int, *, ended: bool = True, size: int = 10, group: str = WORLD) -> Collective:
    return Collective(group, number, "gloo:all_reduce", [[size]], ended)


def exchange(number: int, *, ended: bool = True, rows: int = 10, group: str) -> Collective:
    return Collective(group, number, "gloo:all_to_all", [[rows]], ended)


def left_by(rank: int, *collectives: Collective, error: str = "", problem: str = "") -> Dump:
    """What a rank of four has left; thrown out of its last collective if there is an error."""
    ranks = {group: members for group, members in RANKS.items() if rank in members}
    told = Flight(ranks, list(collectives), problem)
    stack = ["/there/moetrain/trainer.py:98 _step", "/torch/c10d.py:7 all_reduce"]
    return Dump(rank, 4, f"host{rank}", 100 + rank, 12, "step", 5.0, error, bool(error), stack, {}, told)


def by_rank(*dumps: Dump) -> dict[int, Dump]:
    return {one.rank: one for one in dumps}


def test_a_chain_of_waits_ends_at_the_rank_that_waits_for_nobody() -> None:
    """Rank 2 sleeps before its exchange with rank 3, for both of which ranks 0 and 1 wait."""
    dumps = by_rank(
        left_by(0, reduce(4), exchange(7, group=FIRST_EP), reduce(5, ended=False)),
        left_by(1, reduce(4), exchange(7, group=FIRST_EP), reduce(5), error="RuntimeError: timed out"),
        left_by(2, reduce(4), exchange(6, group=SECOND_EP)),
        left_by(3, reduce(4), exchange(7, ended=False, group=SECOND_EP)),
    )
    found = hang.waits(dumps)
    assert [(wait.ranks, wait.waiting, wait.missing) for wait in found] == [
        ([0, 1, 2, 3], [0, 1], [2, 3]),
        ([2, 3], [3], [2]),
    ]
    assert hang.culprits(dumps, found) == [2]
    text = hang.report(dumps, 4)
    assert "TRAINING HAS STOPPED at step 12: ranks [2] have not come to gloo:all_reduce [[10]]" in text
    assert "ranks [3] wait in gloo:all_to_all [[10]], number 7 of the group [2, 3]; not come to it: ranks [2]" in text
    assert "in /there/moetrain/trainer.py:98 _step -> /torch/c10d.py:7 all_reduce" in text
    assert "RuntimeError: timed out" in text


def test_a_silent_rank_is_missing_from_what_its_peers_wait_in() -> None:
    dumps = by_rank(*(left_by(rank, reduce(1), reduce(2, ended=False)) for rank in (0, 2, 3)))
    (wait,) = hang.waits(dumps)
    assert (wait.waiting, wait.missing) == ([0, 2, 3], [1])
    text = hang.report(dumps, 4)
    assert "ranks [1] have not come" in text
    assert "rank 1: silent" in text


def test_a_rank_that_left_a_collective_out_is_the_odd_one() -> None:
    """It makes its third as its second, so that all have begun number 2; exchanges may differ in size."""
    uneven = [exchange(1, rows=10 + rank, group=FIRST_EP) for rank in range(2)]
    dumps = by_rank(
        left_by(0, uneven[0], reduce(1), reduce(2, size=3, ended=False)),
        left_by(1, uneven[1], reduce(1), reduce(2, size=3, ended=False)),
        left_by(2, reduce(1), reduce(2, size=99), error="RuntimeError: connection closed"),
        left_by(3, reduce(1), reduce(2, size=3, ended=False)),
    )
    (difference,) = hang.differences(dumps)
    assert difference.number == 2
    assert difference.begun == {"gloo:all_reduce [[3]]": [0, 1, 3], "gloo:all_reduce [[99]]": [2]}
    assert "ranks [2] have left the others' order" in hang.report(dumps, 4)


def test_a_rank_that_failed_by_itself_waits_for_nobody() -> None:
    own = dataclasses.replace(left_by(1, reduce(1)), error="ValueError: planted")
    dumps = by_rank(*(left_by(rank, reduce(1), reduce(2, ended=False)) for rank in (0, 2, 3)), own)
    assert hang.culprits(dumps, hang.waits(dumps)) == [1]
    assert "ValueError: planted" in hang.report(dumps, 4)


def test_a_link_that_is_down_is_no_rank_that_is_late() -> None:
    """Ranks 1 and 2 are cut off from each other within what all have come to; rank 0 still waits in it."""
    broken = [left_by(rank, reduce(1), reduce(2), error="RuntimeError: timed out") for rank in (1, 2, 3)]
    dumps = by_rank(left_by(0, reduce(1), reduce(2, ended=False)), *broken)
    text = hang.report(dumps, 4)
    assert (
        "ranks [0, 1, 2, 3] have all come to gloo:all_reduce [[10]], which has failed: see the links of host0" in text
    )
    assert "wait in gloo:all_reduce [[10]], number 2 of the group [0, 1, 2, 3]; all have come to it" in text


def test_nothing_known_of_collectives_is_said_and_not_passed_over() -> None:
    dumps = by_rank(*(left_by(rank, problem="no recorder here") for rank in (0, 1)))
    text = hang.report(dumps, 4)
    assert "ranks [2, 3] are silent" in text
    assert text.count("no recorder here") == 1


def test_a_dump_is_read_as_it_was_written(tmp_path: Path) -> None:
    one = left_by(3, reduce(1), error="RuntimeError: x")
    dump.write(tmp_path / "hang", one)
    assert dump.read_all(tmp_path / "hang") == {3: one}
    assert [path.name for path in (tmp_path / "hang").iterdir()] == ["rank_3.json"]


def test_a_torch_without_the_recorder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight, "DUMPS", ("_not_there",))
    assert "no flight recorder that moetrain can read" in flight.read().problem


@pytest.mark.parametrize("own", [{}, {"TORCH_FR_BUFFER_SIZE": "7"}, {"TORCH_NCCL_TRACE_BUFFER_SIZE": "7"}])
def test_the_recorder_is_switched_on_but_not_against_the_user(
    own: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    flight.record_collectives()
    assert {name: os.environ[name] for name in names if name in os.environ} == (own or {names[0]: "2000"})
