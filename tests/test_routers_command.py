"""``moetrain routers``: the table says of every option what its class says."""

from __future__ import annotations

import io
import json
from dataclasses import asdict

import pytest
import torch

from moetrain import cli
from moetrain.compose import options
from moetrain.moe.replay import Replay
from moetrain.parity.record import read_record
from moetrain.survey.catalogue import catalogue
from moetrain.survey.table import WIDE, print_table
from tests.catalog import ROUTERS, tiny_with, traits
from tests.tiny import moe_layer, seen

ROWS = catalogue(tiny_with("mixtral"), None)
EVEN = [row.name for row in ROWS if row.traits is not None and row.traits.even]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def told(capsys, *words: str, status: int = 0) -> str:
    assert cli.main(["routers", *words]) == status
    captured = capsys.readouterr()
    return captured.out if status != 2 else captured.err


def test_json_has_every_router_as_its_class_and_its_file_describe_it(capsys):
    told_json = json.loads(told(capsys, "--json"))
    rows = {row["name"]: row for row in told_json["routers"]}
    assert list(rows) == options("router")
    record = read_record()
    assert told_json["transformers"] == record.transformers
    for name in ROUTERS:
        assert rows[name]["faults"] == []
        assert rows[name]["paper"]
        assert rows[name]["balance"] in options("balance")
        measured = [asdict(case) for case in record.cases if case.router == name]
        assert (rows[name]["reference"] or {"measured": []})["measured"] == measured, name
    for name in ROUTERS[::5]:
        assert rows[name]["traits"] == asdict(traits(name)), name
    assert sum(row["reference"] is not None for row in rows.values()) >= 20


def test_in_a_pipe_every_router_is_one_plain_line(capsys):
    text = told(capsys)
    assert "\x1b" not in text
    lines = {line.split()[0]: line for line in text.splitlines()[1 : 1 + len(ROUTERS)]}
    assert list(lines) == ROUTERS
    assert "Fedus et al. 2021 2101.03961" in lines["switch"]
    assert "jitter" in lines["switch"]
    for case in read_record().cases:
        assert case.block.rpartition(".")[2] in lines[case.router]
    assert "sign bias + sequence loss" in lines["deepseek_v3"]
    assert "2 ragged no " in lines["expert_choice"]
    assert "never drops" in lines["expert_choice"]
    assert "in eval only" in lines["base_layers"]


@pytest.mark.parametrize("width", [100, WIDE, 160])
def test_on_a_terminal_nothing_is_cut_off(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    print_table(ROWS, read_record(), stream)
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert [line.split()[0] for line in lines if line[:1].isalnum() and line.split()[0] in ROUTERS] == ROUTERS
    last = "".join(line[lines[0].index("equal to") :].strip() for line in lines[1 : lines.index("")])
    for case in read_record().cases[:1]:
        assert case.block.rpartition(".")[2] in last


def test_what_is_missing_or_cannot_work_is_said_by_name(capsys, tmp_path):
    (tmp_path / "router").mkdir()
    target = "_target_: moetrain.moe.routers.token_choice.TokenChoiceRouter"
    (tmp_path / "router" / "mine.yaml").write_text(f"{target}\ntop_k: 3\n")
    (tmp_path / "router" / "wrong.yaml").write_text(f"{target}\ntop_q: 3\n")
    text = told(capsys, "--config-dir", str(tmp_path))
    assert "mine: the file has no _about_" in text
    assert "wrong: router.top_q: router has no key 'top_q'" in text
    (line,) = [line for line in text.splitlines() if line.startswith("mine ")]
    assert line.split()[:3] == ["mine", "?", "3"]


def test_the_number_of_experts_is_that_of_the_overrides(capsys):
    (before,) = [row.traits for row in ROWS if row.name == "longcat"]
    (after,) = [row for row in json.loads(told(capsys, "--json", "experts=e64"))["routers"] if row["name"] == "longcat"]
    assert after["traits"]["experts_per_token"] > before.experts_per_token


def test_the_table_shows_files_and_takes_no_router(capsys):
    assert "the table shows every option as its file says" in told(capsys, "router=mixtral", status=2)


def test_measuring_needs_transformers(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    assert "need the package transformers" in told(capsys, "--measure", status=2)


def test_a_fresh_measurement_takes_the_place_of_the_record(capsys, monkeypatch):
    pytest.importorskip("transformers")
    from moetrain.survey import references

    monkeypatch.setattr(references, "CASES", references.CASES[:1])
    rows = {row["name"]: row for row in json.loads(told(capsys, "--measure", "--json"))["routers"]}
    (name,) = [name for name, row in rows.items() if row["reference"] is not None]
    assert name == references.CASES[0].router
    assert rows[name]["reference"]["measured"][0]["output_error"] < 1e-6


@pytest.mark.parametrize("name", EVEN)
def test_routers_that_never_drop_are_even(name):
    router = moe_layer(tiny_with(name)).router.train()
    x_TD = torch.randn(64, 16, generator=torch.Generator().manual_seed(3))
    routing = router(seen(x_TD), Replay())
    valid_TK = torch.ones_like(routing.expert_TK, dtype=torch.bool) if routing.valid_TK is None else routing.valid_TK
    assert torch.bincount(routing.expert_TK[valid_TK], minlength=8).unique().numel() == 1
