"""``moetrain routers compare``: what is planned, started, started again, reported; and two routers for real."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from moetrain import cli
from moetrain.monitor.jsonl import MetricsFile
from moetrain.monitor.runfolder import config_hash
from moetrain.problems import report
from moetrain.survey import command
from moetrain.survey.report import write_reports
from moetrain.survey.runs import Asked, Comparison, Run, carry_out, notes_of, plan_comparison
from moetrain.types import ConfigError
from tests.catalog import ROUTERS

ROOT = Path(__file__).parents[1]
STEPS = 8
SMALL = [
    "recipe=router_comparison",
    "model.context=32",
    "model.num_layers=1",
    f"train.steps={STEPS}",
    "train.global_batch=4",
    "train.micro_batch=2",
    "train.eval_batches=1",
    "optim.warmup_steps=1",
    "monitor.log_every=2",
    "engine=local",
    "machine.device=cpu",
]


def told(capsys, *words: str, status: int = 0) -> str:
    assert cli.main(["routers", *words]) == status
    captured = capsys.readouterr()
    return captured.out if status != 2 else captured.err


def test_the_shipped_comparison_was_written_by_its_command():
    text = (ROOT / "recipes" / "router_comparison.md").read_text(encoding="utf-8")
    assert "\nmoetrain routers compare recipe=router_comparison router=" in text
    rows = [
        line.split(" | ") for line in text.split("## Loss")[1].split("##")[0].splitlines() if line.startswith("| `")
    ]
    names = [row[0].split("`")[1] for row in rows]
    assert len(set(names)) >= 8
    assert set(names) <= set(ROUTERS)
    assert all(int(row[2]) >= 3 for row in rows), "seeds"
    assert "What this does not show" in text
    assert "## Failed" not in text


def asked(out: Path, *words: str, **changes) -> Asked:
    given = {"config_dir": None, "world": 1, "num_seeds": 2, "balance": "published", **changes}
    return Asked((*SMALL, *words), out=out, **given)


def pretend(loss: Callable[[Run], float]) -> Callable[[Run], int]:
    """A launcher that writes what a run would have written."""

    def launch(run: Run) -> int:
        run.folder.path.mkdir(parents=True, exist_ok=True)
        start = {"world_size": 1, "commit": "abc", "dirty": False, "versions": {"torch": "2.13"}}
        record = {"config_hash": config_hash(run.config), "config": {}, "starts": [start]}
        run.folder.record.write_text(json.dumps(record))
        with MetricsFile(run.folder.metrics, 0, 0) as metrics:
            for step in range(2, STEPS + 1, 2):
                row = dict.fromkeys(("max_vio_mean", "max_vio_max", "load_max", "drop_fraction"), float(step))
                row |= {"dead_experts": 1.0, "experts_per_token": 2.0}
                speed = {"train/lm_loss": 9.0 - step, "perf/tokens_per_second": 100.0 * step}
                metrics.write(step, 64 * step, {f"balance/{name}": value for name, value in row.items()} | speed)
            metrics.write(STEPS, 64 * STEPS, {"validation/lm_loss": loss(run)})
        return 0

    return launch


def by_name(run: Run) -> float:
    return {"mixtral": 3.0, "switch": 2.0, "deepseek_v3": 4.0}[run.router] + 0.25 * run.seed


def problems_of(given: Asked) -> str:
    with pytest.raises(ConfigError) as caught:
        plan_comparison(given)
    return report(caught.value.problems)


def compared(out: Path, *words: str, **changes) -> tuple[Comparison, dict]:
    given = asked(out, *words, **changes)
    comparison = plan_comparison(given)
    assert carry_out(comparison, pretend(by_name), lambda line: None) == []
    write_reports(comparison, [], given.balance, ["moetrain", "routers", "compare", *words], out)
    return comparison, json.loads((out / "report.json").read_text())


def test_every_router_runs_with_every_seed_and_the_balance_it_was_published_with(tmp_path):
    comparison, _ = compared(tmp_path, "router=mixtral,deepseek_v3", "run.seed=5")
    names = ["mixtral-seed5", "deepseek_v3-seed5", "mixtral-seed6", "deepseek_v3-seed6"]
    assert [run.name for run in comparison.runs] == names
    for run in comparison.runs:
        assert run.config.run.seed == int(run.name[-1])
        assert run.config.balance.scope == ("sequence" if run.router == "deepseek_v3" else "micro_batch")
        assert run.folder.path == tmp_path / run.name


def test_the_recipes_balance_for_all_if_asked(tmp_path):
    given = asked(tmp_path, "router=mixtral,deepseek_v3", "balance.balance_coef=0.5", balance="same")
    assert {run.config.balance.balance_coef for run in plan_comparison(given).runs} == {0.5}


def test_the_report_by_hand(tmp_path):
    _, document = compared(tmp_path, "router=mixtral,switch", "run.seed=0")
    first, second = document["routers"]
    assert [first["router"], second["router"]] == ["switch", "mixtral"]
    assert first["spreads"]["validation_loss"] == pytest.approx(
        {"mean": 2.125, "low": 2.0, "high": 2.25, "std": 0.25 / 2**0.5, "num_missing": 0}
    )
    assert second["behind_best"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "std": 0.0, "num_missing": 0}
    assert first["runs"]["0"] == {
        "validation_loss": 2.0,
        "train_loss": 1.0,  # of the last window
        "max_vio": 7.0,  # the mean of the windows that end with steps 6 and 8, as the next ones
        "worst_vio": 7.0,
        "drop_fraction": 7.0,
        "dead_experts": 1.0,
        "experts_per_token": 2.0,
        "tokens_per_second": 600.0,  # the median of 400, 600 and 800
        "num_windows": 2,
        "no_load": 0,
    }
    text = (tmp_path / "report.md").read_text()
    assert "| `switch` | switch | 2 | 2.1250 (2.0000 .. 2.2500) | - | 1.0000 (1.0000 .. 1.0000) |" in text
    assert "moetrain routers compare router=mixtral,switch run.seed=0" in text
    assert "What this does not show" in text
    assert "commit abc; torch 2.13" in text


def test_a_router_that_sees_later_tokens_is_last_and_marked(tmp_path):
    losses = {"mixtral": 3.0, "expert_choice": 0.1}
    given = asked(tmp_path, "router=expert_choice,mixtral", "experts.allow_noncausal=true")
    comparison = plan_comparison(given)
    carry_out(comparison, pretend(lambda run: losses[run.router]), lambda line: None)
    write_reports(comparison, [], "published", ["x"], tmp_path)
    rows = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| `")]
    assert [row.split(" | ")[0] for row in rows[:2]] == ["| `mixtral`", "| `expert_choice` \\*"]


def test_what_is_done_is_not_done_again_and_what_is_not_is(tmp_path):
    comparison, _ = compared(tmp_path, "router=mixtral,switch")
    comparison.runs[2].folder.metrics.unlink()
    started: list[str] = []

    def launch(run: Run) -> int:
        started.append(run.name)
        return pretend(by_name)(run)

    again = plan_comparison(asked(tmp_path, "router=mixtral,switch"))
    assert carry_out(again, launch, lambda line: None) == []
    assert started == [comparison.runs[2].name]


def test_a_folder_of_another_configuration_is_refused_before_anything_starts(tmp_path):
    compared(tmp_path, "router=mixtral,switch")
    told = problems_of(asked(tmp_path, "router=mixtral,switch", "optim.lr=0.5"))
    assert told.count("holds a run of another configuration") == 4
    assert "was started on 1" in problems_of(asked(tmp_path, "router=mixtral,switch", world=2))
    (tmp_path / "switch-seed0" / "run.json").write_text("{")
    assert "run.json is damaged" in problems_of(asked(tmp_path, "router=mixtral,switch"))


def test_all_mistakes_at_once_before_anything_starts(tmp_path):
    words = ("router=mixtrl,base_layers,switch,mixtral", "balance=none", "run.id=a", "train.steps=abc")
    text = problems_of(asked(tmp_path, *words, num_seeds=0))
    assert "nearest is router=mixtral" in text
    assert "(in training), which a causal language model can't (with router=base_layers)" in text
    assert "say --balance same" in text
    assert "a comparison names its runs itself" in text
    assert "--seeds = 0" in text
    assert text.count("must be a whole number") == 1
    assert "must be a whole number\n" in text, "what all routers have in common is told without their names"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "line", "reason", "fix"),
    [
        ((), "router = null", "at least two different routers", "add router=mixtral,switch"),
        (("router=mixtral",), "router = mixtral\n", "at least two different routers", "router=mixtral,switch"),
        (("router=a,b,a",), "router = a,b,a\n", "a is there more than once", "write router=a,b\n"),
        (("router=a,,b",), "router = a,,b\n", "no name between two commas", "write router=a,b\n"),
        (("router=a,b", "router=c"), "router = a,b router=c\n", "is there 2 times", "once: router=a,b,c\n"),
        (("router=[a,b]",), "router = [a,b]\n", "not written as a list", "write router=a,b\n"),
        (("routers=a,b",), "routers = a,b\n", "nearest is router", "write router=a,b\n"),
    ],
)
def test_what_is_wrong_with_the_names(tmp_path, words, line, reason, fix):
    text = problems_of(asked(tmp_path, *words))
    assert line in text
    assert reason in text
    assert fix in text


@pytest.mark.parametrize("world", ["0", "-1"])
def test_a_world_is_at_least_one(capsys, tmp_path, world):
    words = ["compare", *SMALL, "router=mixtral,switch", "--world", world, "--out", str(tmp_path)]
    text = told(capsys, *words, status=2)
    assert f"--world = {world}" in text
    assert "must be at least 1" in text


def test_routers_that_are_one_are_said_before_they_are_trained(tmp_path):
    (note,) = notes_of(plan_comparison(asked(tmp_path, "router=mixtral,switch,hunyuan")))
    assert note.startswith("Note: mixtral and hunyuan are one class with the same settings; their runs differ in")
    (note,) = notes_of(plan_comparison(asked(tmp_path, "router=mixtral,hunyuan", balance="same")))
    assert "balance is the same too" in note
    assert notes_of(plan_comparison(asked(tmp_path, "router=mixtral,switch"))) == []


def test_a_run_that_trained_to_nan_and_windows_without_load_are_said(tmp_path):
    """mixtral-seed0 ends in NaN; switch-seed1 had a layer without load in one window, switch-seed0 in all."""
    comparison = plan_comparison(asked(tmp_path, "router=mixtral,switch", "run.seed=0"))

    def launch(run: Run) -> int:
        pretend(lambda run: math.nan if run.name == "mixtral-seed0" else by_name(run))(run)
        lines = run.folder.metrics.read_text().splitlines(keepends=True)
        empty = {"switch-seed1": (8,), "switch-seed0": (6, 8)}.get(run.name, ())
        for number, row in enumerate(map(json.loads, lines)):
            if row.get("train/step") in empty and "balance/max_vio_mean" in row:
                lines[number] = (
                    json.dumps(row | {f"balance/max_vio_{which}": "NaN" for which in ("mean", "max")}) + "\n"
                )
        run.folder.metrics.write_text("".join(lines))
        return 0

    failures = carry_out(comparison, launch, lambda line: None)
    write_reports(comparison, failures, "published", ["x"], tmp_path)
    document = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    first, last = document["routers"]
    assert [first["router"], last["router"]] == ["switch", "mixtral"]
    assert first["spreads"]["max_vio"] == {"mean": 6.0, "low": 6.0, "high": 6.0, "std": None, "num_missing": 1}
    assert last["runs"]["0"]["validation_loss"] is None
    text = (tmp_path / "report.md").read_text()
    assert "- `mixtral`, seed 0: its validation loss is nan." in text
    assert "- `switch`, seed 0: no load on some layer in 2 of 2 windows." in text
    assert "- `switch`, seed 1: no load on some layer in 1 of 2 windows." in text
    assert "| 3.2500, 1 seed(s) without |" in text


def test_a_router_all_of_whose_runs_end_in_nan_comes_last(tmp_path):
    comparison = plan_comparison(asked(tmp_path, "router=mixtral,switch"))
    losses = {"mixtral": math.nan, "switch": 2.0}
    carry_out(comparison, pretend(lambda run: losses[run.router]), lambda line: None)
    write_reports(comparison, [], "published", ["x"], tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| `mixtral` | mixtral | 2 | no number | no number | 1.0000 (1.0000 .. 1.0000) |" in text


def test_a_report_is_written_when_every_run_failed(tmp_path):
    comparison = plan_comparison(asked(tmp_path, "router=mixtral,switch"))
    failures = carry_out(comparison, lambda run: 1, lambda line: None)
    write_reports(comparison, failures, "published", ["x"], tmp_path)
    assert len(json.loads((tmp_path / "report.json").read_text())["failed"]) == 4


def test_a_router_that_does_not_say_what_it_was_published_with(tmp_path):
    (tmp_path / "router").mkdir()
    (tmp_path / "router" / "mine.yaml").write_text("_target_: moetrain.moe.routers.token_choice.TokenChoiceRouter\n")
    given = {"config_dir": str(tmp_path)}
    assert "does not say what it was published with" in problems_of(asked(tmp_path, "router=mine,switch", **given))
    assert plan_comparison(asked(tmp_path, "router=mine,switch", balance="same", **given)).runs


def test_compare_under_torchrun_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it without torchrun" in problems_of(asked(tmp_path, "router=mixtral,switch"))


def test_a_run_that_fails_is_named_and_stops_no_other(tmp_path, capsys, monkeypatch):
    def launch(run: Run) -> int:
        if run.name != "mixtral-seed0":
            return pretend(by_name)(run)
        tmp_path.joinpath("mixtral-seed0.log").write_text("it broke\nE1 failed (exitcode: 1)\nmore of torchrun\n")
        return 1

    monkeypatch.setattr(command, "launcher", lambda world, config_dir: launch)
    words = ["compare", *SMALL, "router=mixtral,switch", "--world", "1", "--seeds", "2", "--out", str(tmp_path)]
    text = told(capsys, *words, status=1)
    assert "mixtral-seed0 FAILED" in text
    assert text.rstrip().endswith("it broke")
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["failed"] == ["mixtral-seed0"]
    assert {row["router"]: list(row["runs"]) for row in document["routers"]} == {"switch": ["0", "1"], "mixtral": ["1"]}
    assert "it broke" in (tmp_path / "report.md").read_text()


def test_two_routers_compared_for_real(tmp_path, capsys, monkeypatch):
    """From a folder with a blank in its name; and again, which starts nothing."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "my runs"
    (tmp_path / "corpus.txt").write_text("Who chooses whom, and how many of them are there?\n" * 400)
    data = ["data=text", f"data.path={tmp_path / 'corpus.txt'}", "data.tokenizer=byte", f"data.cache={tmp_path / 'c'}"]
    words = ["compare", *SMALL, *data, "router=switch,deepseek_v3", "--world", "1"]
    words += ["--seeds", "1", "--out", str(out)]
    told(capsys, *words)
    document = json.loads((out / "report.json").read_text())
    assert {row["router"] for row in document["routers"]} == {"switch", "deepseek_v3"}
    for row in document["routers"]:
        numbers = row["runs"]["0"]
        assert 2.0 < numbers["validation_loss"] < 6.0
        assert numbers["experts_per_token"] == row["traits"]["experts_per_token"]
        assert 0.0 <= numbers["drop_fraction"] < 0.9
        assert numbers["tokens_per_second"] > 0
    assert told(capsys, *words).count("done before") == 2
