"""``moetrain routers``: the table says of every option what its class says."""

from __future__ import annotations

import io
import json
import re
from dataclasses import asdict

import pytest
import torch

from moetrain import cli
from moetrain.compose import options
from moetrain.moe.replay import Replay
from moetrain.parity.record import read_record
from moetrain.survey.catalogue import catalogue
from moetrain.survey.table import COLUMNS, print_table
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
        assert rows[name]["capacity"] in (None, *options("capacity"))
        measured = [asdict(case) for case in record.cases if case.router == name]
        assert (rows[name]["reference"] or {"measured": []})["measured"] == measured, name
    for name in ROUTERS[::5]:
        assert rows[name]["traits"] == json.loads(json.dumps(asdict(traits(name)))), name
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
    assert lines["expert_choice"].split()[1:3] == ["~2", "no"]
    assert lines["base_layers"].split()[2] == "eval"
    assert " token ids " in lines["hash"]
    assert "Granite Team, IBM 2024 " in lines["granite"]
    firsts = {name: line.split()[-1].split(",")[0] for name, line in lines.items()}
    expected = {
        "qwen3_moe": "Qwen3MoeSparseMoeBlock",
        "cohere2": "Cohere2MoeSparseMoeBlock",
        "kimi_k2": "DeepseekV3MoE",
        "olmoe": "OlmoeSparseMoeBlock",
    }
    assert firsts.items() >= expected.items()
    assert "cohere2 = granite = topk; dots1 = glm4_5 = nemotron_h" in " ".join(text.split())
    assert " dropless, even " in lines["expert_choice"]
    assert " seed " in lines["switch"]
    assert " dropless " in lines["remoe"]
    assert " ? " in lines["hash"]
    for word in ("needs: token ids", "capacity.priority=token_major", "capacity.scope=sequence"):
        assert word in text.replace("\n", " ")


@pytest.mark.parametrize(
    ("width", "last"), [(80, "error"), (100, "capacity"), (130, "paper"), (160, "equal to"), (200, "equal to")]
)
def test_a_terminal_shows_whole_columns_and_says_which_it_leaves_out(monkeypatch, width, last):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    print_table(ROWS, read_record(), stream)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()).splitlines()
    assert max(map(len, lines)) <= width
    assert [line.split()[0] for line in lines[1 : lines.index("")]] == ROUTERS, "one line per router"
    assert lines[0].rstrip().endswith(last)
    below = " ".join(" ".join(lines[lines.index("") :]).split())
    missing = list(COLUMNS)[list(COLUMNS).index(last) + 1 :]
    assert (f"Too narrow for {', '.join(missing)}:" in below) == bool(missing)
    if not missing:
        assert any(line.endswith(" SwitchTransformersSparseMLP") for line in lines)
        assert any(line.endswith(" Qwen3MoeSparseMoeBlock +8") for line in lines)


def test_what_is_missing_or_cannot_work_is_said_by_name(capsys, tmp_path):
    (tmp_path / "router").mkdir()
    target = "_target_: moetrain.moe.routers.token_choice.TokenChoiceRouter"
    (tmp_path / "router" / "mine.yaml").write_text(f"{target}\ntop_k: 3\n")
    (tmp_path / "router" / "wrong.yaml").write_text(f"{target}\ntop_q: 3\n")
    text = told(capsys, "--config-dir", str(tmp_path))
    assert "mine: the file has no _about_" in text
    assert "wrong: router.top_q: router has no key 'top_q'" in text
    (line,) = [line for line in text.splitlines() if line.startswith("mine ")]
    assert line.split()[:2] == ["mine", "3"]


OWN = """
from moetrain.moe.routers.token_choice import TokenChoiceRouter

class Raises(TokenChoiceRouter):
    @staticmethod
    def traits(**own):
        raise KeyError("nothing here")

class Says(TokenChoiceRouter):
    @staticmethod
    def traits(**own):
        return "fine"

class Asks(TokenChoiceRouter):
    @staticmethod
    def problems(**own):
        return 1 / 0
"""


def test_a_class_of_ones_own_that_breaks_is_the_fault_of_its_row(capsys, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_routers.py").write_text(OWN)
    (tmp_path / "conf" / "router").mkdir(parents=True)
    for name in ("Raises", "Says", "Asks"):
        (tmp_path / "conf" / "router" / f"my{name}.yaml").write_text(f"_target_: broken_routers.{name}\n")
    words = ["machine.allow_modules=[broken_routers]", "--config-dir", str(tmp_path / "conf")]
    rows = {row["name"]: row for row in json.loads(told(capsys, "--json", *words))["routers"]}
    reasons = {"Raises": "its traits() raised KeyError: 'nothing here'", "Says": "its traits() gives str"}
    reasons["Asks"] = "its problems() raised ZeroDivisionError"
    for name, reason in reasons.items():
        (fault,) = rows[f"my{name}"]["faults"]
        assert reason in fault
        assert cli.main(["check", f"router=my{name}", *words]) == 2
        text = capsys.readouterr().err
        assert "1 problem " in text
        assert reason in text
        assert name == "Says" or "broken_routers.py, line " in text
    assert rows["mixtral"]["faults"] == []


def test_a_file_of_ones_own_that_is_no_yaml_is_named_with_its_line(capsys, tmp_path):
    (tmp_path / "router").mkdir()
    (tmp_path / "router" / "mine.yaml").write_text("_target_: a.b\ntop_k: [1, 2\nscore: x\n")
    where = f"{tmp_path / 'router' / 'mine.yaml'}, line 3"
    assert where in told(capsys, "--config-dir", str(tmp_path), status=2)
    assert cli.main(["check", "router=mine", "--config-dir", str(tmp_path)]) == 2
    assert where in capsys.readouterr().err


def test_a_balance_that_there_is_not_is_refused_where_it_is_named(capsys, tmp_path):
    (tmp_path / "router").mkdir()
    text = "_target_: moetrain.moe.routers.token_choice.TokenChoiceRouter\n_about_: {paper: P, balance: foo}\n"
    (tmp_path / "router" / "mine.yaml").write_text(text)
    folder = ("--config-dir", str(tmp_path))
    (line,) = [line for line in told(capsys, *folder).splitlines() if line.startswith("mine: ")]
    assert line.startswith("mine: router._about_.balance: there is no such option")
    for words in (["check", "router=mine"], ["routers", "compare", "router=mine,mixtral"]):
        assert cli.main([*words, *folder]) == 2
        text = capsys.readouterr().err
        assert "router._about_.balance = foo" in text
        assert "choose dbrx | deepseek_v2" in text
        assert "1 problem " in text


@pytest.mark.parametrize(
    ("word", "fix"), [("list", "routers alone lists all"), ("comparee", "routers compare router=")]
)
def test_the_only_sub_command_is_compare(capsys, word, fix):
    text = told(capsys, word, status=2)
    assert "the only sub-command of moetrain routers is compare" in text
    assert fix in text


def test_a_fault_says_what_to_do(capsys):
    rows = {row["name"]: row for row in json.loads(told(capsys, "--json", "experts=e4"))["routers"]}
    (fault,) = rows["deepseek_v3"]["faults"]
    assert "set router." in fault.rpartition("; ")[2]


def test_options_that_are_one_router_are_named(capsys):
    rows = {row["name"]: row["same_as"] for row in json.loads(told(capsys, "--json"))["routers"]}
    assert rows["glm4_5"] == ["dots1", "nemotron_h"]
    assert rows["qwen3_moe"] == ["hunyuan", "mixtral"]
    assert rows["deepseek_v3"] == []


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
