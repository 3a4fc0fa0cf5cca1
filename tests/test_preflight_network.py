"""Host names and interfaces: what would keep ranks from meeting is said before they try. And the command itself."""

from __future__ import annotations

import dataclasses
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from moetrain import cli
from moetrain.monitor.events import read_events
from moetrain.preflight import Finding, network, storage, world
from moetrain.preflight.network import Place, judge_places

GOOD = Place(
    host="n1",
    addresses=["10.0.0.2"],
    interfaces=["lo", "eth0", "ib0"],
    gloo="",
    nccl="",
    master="n0",
    master_addresses=["10.0.0.1"],
    several_hosts=True,
    first_host=False,
    uses_gloo=True,
)
SMALL = [
    "recipe=quickstart",
    "model=nano",
    "model.context=32",
    "train.steps=2",
    "train.global_batch=2",
    "train.micro_batch=2",
    "train.eval_every=0",
    "train.eval_batches=1",
    "train.sample_tokens=0",
    "train.checkpoint_every=0",
    "optim.warmup_steps=1",
    "engine=local",
    "dispatch=local",
    "machine.device=cpu",
    "monitor.progress=false",
    "run.id=first-try",
]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"gloo": "eth9"}, "there is no interface eth9: n1 has lo, eth0, ib0"),
        ({"gloo": "eth0,eth8"}, "there is no interface eth8"),
        ({"gloo": "ib0"}, ""),
        ({"nccl": "eth"}, ""),
        ({"nccl": "=eth"}, "no interface fits =eth"),
        ({"nccl": "=eth0"}, ""),
        ({"nccl": "^docker,lo"}, ""),
        ({"nccl": "^lo,eth,ib"}, "no interface fits"),
        ({"nccl": "^=lo"}, ""),
        ({"addresses": ["127.0.1.1"]}, r"the name n1 resolves to 127\.0\.1\.1, where no other host reaches it"),
        ({"addresses": ["::1"]}, "the name n1 resolves to ::1"),
        ({"addresses": ["fe80::1%eth0"]}, ""),
        ({"addresses": []}, "the name n1 does not resolve"),
        ({"addresses": ["127.0.1.1"], "gloo": "eth0"}, ""),
        ({"addresses": ["127.0.1.1"], "uses_gloo": False}, ""),
        ({"addresses": ["127.0.1.1"], "several_hosts": False}, ""),
        ({"master_addresses": ["127.0.1.1"]}, r"MASTER_ADDR n0 resolves to 127\.0\.1\.1 on n1"),
        ({"master_addresses": []}, "MASTER_ADDR n0 resolves to nothing"),
        ({"master_addresses": ["127.0.1.1"], "first_host": True}, ""),
    ],
)
def test_a_place_is_judged(changes: dict[str, Any], said: str) -> None:
    found = judge_places([GOOD, dataclasses.replace(GOOD, **changes)])
    assert found.ok == (said == "")
    if said:
        assert re.match(rf"{said}.* \(rank 1\)$", found.detail), found.detail
        assert found.fix


def test_this_host_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "GROUP_RANK", network.GLOO, network.NCCL):
        monkeypatch.delenv(name, raising=False)
    here = network.place("cpu")
    assert "lo" in here.interfaces
    assert (here.several_hosts, here.first_host, here.uses_gloo) == (False, True, True)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("GROUP_RANK", "1")
    there = network.place("cuda")
    assert "127.0.0.1" in there.master_addresses
    assert (there.several_hosts, there.first_host, there.uses_gloo) == (True, False, False)


def test_a_name_server_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "LOOK_UP_S", 0.05)
    answered = threading.Event()
    monkeypatch.setattr(network.socket, "getaddrinfo", lambda *_: answered.wait(60) and [])
    assert network._addresses("somewhere") == []
    assert not answered.is_set()
    answered.set()


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "text.txt").write_text("In the beginning. " * 200)
    monkeypatch.chdir(tmp_path)
    return [*SMALL, "data=text", "data.path=text.txt", "data.tokenizer=byte", "data.cache=cache"]


def test_the_command_draws_a_table_and_leaves_nothing(arguments: list[str], tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["preflight", *arguments]) == 0
    out = capsys.readouterr().out
    for check in (
        "versions",
        "configuration",
        "data",
        "network",
        "world group",
        "run.root",
        "disk",
        "memory",
        "clocks",
    ):
        assert check in out
    assert "FAILED" not in out
    assert list((tmp_path / "outputs").iterdir()) == []


def test_what_fails_fails_the_command_and_keeps_a_run_from_starting(
    arguments: list[str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_room", lambda root: storage.Room(10, 10))
    arguments.append("train.checkpoint_every=1")
    assert cli.main(["preflight", *arguments]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "fix: free some" in " ".join(out.split())
    assert cli.main(["train", *arguments]) == 2
    told = capsys.readouterr().err
    assert "preflight.disk = 0.00 GiB" in told
    assert "why: 0.00 GiB free, 2 checkpoints at once need 0.08 GiB" in told
    assert "fix: free some, choose another run.root" in told
    assert list((tmp_path / "outputs").iterdir()) == []
    assert cli.main(["train", *arguments, "health.preflight=false", "train.steps=1"]) == 0


def test_a_wrong_interface_is_told_before_anything_is_prepared(
    arguments: list[str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(network.GLOO, "eth77")
    for command in ("preflight", "train"):
        assert cli.main([command, *arguments]) == 2
        assert "preflight.network = GLOO_SOCKET_IFNAME=eth77" in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


def test_a_warning_is_told_and_kept_as_an_event(
    arguments: list[str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Finding("clocks", False, "the clock of rank 1 is 9 s ahead", "synchronise", 9, fatal=False)
    monkeypatch.setattr(world, "check_clocks", lambda mesh: late)
    assert cli.main(["train", *arguments]) == 0
    assert "moetrain: clocks: the clock of rank 1 is 9 s ahead; synchronise" in capsys.readouterr().err
    (event,) = [
        one for one in read_events(tmp_path / "outputs" / "first-try" / "events.jsonl") if one.kind == "preflight"
    ]
    assert event.message.startswith("clocks: ")
