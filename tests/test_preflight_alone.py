"""What preflight counts and measures, without other ranks."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from moetrain.cli import main
from moetrain.config import DataConfig
from moetrain.data import Corpus, prepare
from moetrain.monitor.origin import origin
from moetrain.plan import make_plan
from moetrain.preflight import Finding, examine, exchange, memory, storage
from tests.saved import ONE
from tests.test_preflight import GROUPS
from tests.tiny import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preflight")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Corpus:
    (folder / "text.txt").write_text("In the beginning. " * 50)
    settings = DataConfig(source="text", path=str(folder / "text.txt"), tokenizer="byte", cache=str(folder / "cache"))
    return prepare(settings, context=8)


def test_alone_nothing_is_sent(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = examine(tiny(), ONE, corpus, origin(1))
    assert all(one.ok for one in found)
    assert [one.check for one in found if "nothing to send" in one.detail] == list(GROUPS)


def test_the_command_fits_an_elastic_run_to_the_ranks_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["recipe=quickstart", "model=nano", "machine.device=cpu", "engine.ep_size=4", "run.elastic=true"]
    assert main(["preflight", *words]) == 0
    assert "FAILED" not in capsys.readouterr().out


def test_checkpoints_that_are_there_need_no_room(corpus: Corpus, tmp_path: Path, monkeypatch: Any) -> None:
    """A run that is taken up has written what it keeps: only the difference must be free."""
    monkeypatch.chdir(tmp_path)
    config = tiny(run__id="here", train__checkpoint_every=1)
    each = storage.checkpoint_bytes(config, make_plan(config, 1).size.total)
    held = tmp_path / "outputs" / "here" / "checkpoints" / "step_00000001"
    monkeypatch.setattr(storage, "_room", lambda root: storage.Room(2 * each, None))
    wrong = {one.check for one in examine(config, ONE, corpus, origin(1)) if not one.ok}
    assert wrong == {"disk"}
    held.mkdir(parents=True)
    (held / "rank_00000.safetensors").write_bytes(bytes(each))
    assert all(one.ok for one in examine(config, ONE, corpus, origin(1)))


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({"checkpoint_every": 0}, 0),
        ({"checkpoint_every": 10, "steps": 100}, 3),
        ({"checkpoint_every": 10, "steps": 15}, 2),
        ({"checkpoint_every": 10, "steps": 100, "keep_every": 50, "keep_best": True}, 6),
    ],
)
def test_how_many_checkpoints_lie_there_at_once(changes: dict[str, Any], number: int) -> None:
    config = tiny()
    config = replace(config, train=replace(config.train, **changes))
    assert storage.num_checkpoints(config) == number


def test_a_control_group_can_leave_less_than_the_host_has(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:  50 kB\n")
    assert memory.host_free(tmp_path / "meminfo", tmp_path) == 50 * 1024
    (tmp_path / "memory.max").write_text("20480\n")
    (tmp_path / "memory.current").write_text("10000\n")
    (tmp_path / "memory.stat").write_text("anon 3\ninactive_file 4000\n")
    assert memory.host_free(tmp_path / "meminfo", tmp_path) == 20480 - 6000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.host_free(tmp_path / "meminfo", tmp_path) == 50 * 1024
    assert memory.host_free(tmp_path / "none", tmp_path) is None


def test_a_finding_travels_as_it_is() -> None:
    one = Finding("disk", False, "0 GiB", "free some", "0", fatal=False)
    assert Finding(**json.loads(json.dumps(asdict(one)))) == one


def test_a_slow_rank_is_named_only_where_it_stands_out() -> None:
    def rows(*seconds: float) -> list[exchange.Measured]:
        return [exchange.Measured([], 0.01, 0.01, one) for one in seconds]

    for times, names in (((1, 1, 9, 1), "rank 2 9.0x"), ((0.001, 0.001, 0.004, 0.001), None), ((1, 2, 1, 2.9), None)):
        found = exchange.judge_group("EP", rows(*times), 2**20, 4)
        assert found[1].detail.endswith(names) if names else len(found) == 1, found


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 9])
def test_every_rank_talks_with_both_neighbours_on_the_ring(size: int) -> None:
    met: set[tuple[int, int]] = set()
    for phase in range(2 + size % 2):
        partners = {rank: exchange.partner_of(rank, size, phase) for rank in range(size)}
        assert all(partners[partner] == rank for rank, partner in partners.items() if partner is not None)
        met |= {(rank, partner) for rank, partner in partners.items() if partner is not None}
    assert met == {(rank, (rank + step) % size) for rank in range(size) for step in (1, -1)}
