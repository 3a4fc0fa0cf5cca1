"""The commands that watch runs: which run they mean, what they write, and what they say when there is none."""

from __future__ import annotations

import sys

import pytest

from moetrain import cli
from moetrain.run_commands import COMMANDS, RunParser, run_folder
from moetrain.types import ConfigError
from tests.synthetic_runs import Shape, write_run


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """A working directory whose outputs/ holds two runs."""
    monkeypatch.chdir(tmp_path)
    for name in ("first-try", "second"):
        write_run(tmp_path / "outputs", "healthy", Shape(done=20), name=name)
    return tmp_path / "outputs"


def told(capsys, *words: str, status: int = 0) -> str:
    assert cli.main(list(words)) == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out


def test_a_run_is_its_folder_or_its_id(outputs, capsys):
    assert told(capsys, "report", "second") == "report in outputs/second/report.html\n"
    assert "second" in (outputs / "second" / "report.html").read_text()
    assert told(capsys, "report", str(outputs / "second"), "--out", "here.html") == "report in here.html\n"
    told(capsys, "report", "second", "--out", "both.html", "--compare", "outputs/first-try")
    assert "<title>moetrain: second and first-try</title>" in (outputs.parent / "both.html").read_text()


def test_top_once_draws_the_newest_window(outputs, capsys):
    text = told(capsys, "top", "first-try", "--once")
    assert text.startswith("first-try: ")
    assert "steps 11 to 20" in text


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_is_in_the_help_and_has_a_help(command, capsys):
    assert f"\n  {command} " in told(capsys, "--help")
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    assert f"moetrain {command}" in capsys.readouterr().out


def test_a_run_that_is_not_there_is_one_problem_with_the_runs_that_are(outputs, capsys):
    (outputs / "empty").mkdir()
    for given, fix in (("sceond", "give second"), ("empty", "one of the newest runs in outputs: "), ("x/y", "newest")):
        text = told(capsys, "report", given, status=2)
        assert text.count("why:") == 1
        assert f"RUN = {given}" in text
        assert fix in text
    assert "--compare = nothing" in told(capsys, "report", "second", "--compare", "nothing", status=2)
    assert not list(outputs.glob("*/report.html"))


def test_without_any_run_it_says_what_a_run_looks_like(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="outputs/first-try"):
        run_folder("first-try")


def test_a_wrong_option_is_a_mistake_and_no_exit(capsys):
    assert "see moetrain top --help" in told(capsys, "top", "run", "--twice", status=2)
    with pytest.raises(ConfigError, match="RUN"):
        RunParser("report", "").parse_args([])


def test_wandb_setup_names_the_package_that_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    words = ["wandb-setup", "--entity", "me", "--dump", str(tmp_path / "view.json")]
    assert "fix: pip install 'moetrain[wandb]'" in told(capsys, *words, status=2)
    assert not (tmp_path / "view.json").exists()
