"""The live heat-map: what it says with and without colours, that it fits, follows the run and leaves cleanly."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from rich.console import Console

from moetrain.monitor import top as top_module
from moetrain.monitor.expert_load import ExpertLoadFile, ExpertLoadReader
from moetrain.monitor.jsonl import MetricsFile, MetricsReader
from moetrain.monitor.top import Watch, frame, top
from moetrain.types import ConfigError
from tests.synthetic_runs import Shape, write_run


def drawn(view, width=100, height=40, colours=None) -> str:
    console = Console(file=io.StringIO(), width=width, height=height, color_system=colours, force_terminal=True)
    console.print(frame(view, console))
    return console.file.getvalue()


def rows(text: str) -> list[str]:
    """The layers of the rows of the table."""
    return re.findall(r"^ +(\d+) .*%$", text, re.MULTILINE)


def test_the_newest_window_in_numbers(tmp_path):
    run = write_run(tmp_path, "collapsing", Shape(done=300))
    view = Watch(run).look()
    text = drawn(view)
    assert "collapsing: running" in text
    assert "step 300/400" in text
    share = view.window.assigned_LE[0, 1] / view.window.assigned_LE[0].mean()
    row = next(line for line in text.splitlines() if line.split()[:1] == ["1"])
    assert row.split()[2] == f"{share:.2f}"
    assert re.search(r"^effective experts .*, steps 291 to 300$", text, re.MULTILINE)
    assert "\x1b[" not in text.replace("\x1b[1m", "").replace("\x1b[0m", "")


def test_colours_are_used_where_there_are_any(tmp_path):
    view = Watch(write_run(tmp_path, "collapsing")).look()
    assert "48;2;33;102;172" in drawn(view, colours="truecolor")


@pytest.mark.parametrize(("width", "height"), [(100, 40), (80, 24), (40, 14), (40, 8)])
def test_a_large_model_fits_a_small_terminal(tmp_path, width, height):
    run = write_run(tmp_path, "collapsing", Shape(num_layers=48, num_experts=128, steps=20, world_size=8, ep_size=8))
    lines = drawn(Watch(run).look(), width, height).splitlines()
    assert max(len(line) for line in lines) <= width + len("\x1b[1m\x1b[0m")
    assert len(lines) <= max(height - 1, 10)
    layers = len(rows("\n".join(lines)))
    assert f"{layers} of 48 layers" in lines[2]
    assert layers == 1 or len(lines) == height - 1, "no line is wasted"


def test_the_layers_that_are_shown_are_the_busiest_in_order(tmp_path):
    view = Watch(write_run(tmp_path, "healthy", Shape(num_layers=30))).look()
    worst = max(range(30), key=lambda row: view.window.assigned_LE[row].max())
    shown = rows(drawn(view, 100, 12))
    assert len(shown) == 5
    assert str(view.window.layers[worst]) in shown
    assert shown == sorted(shown, key=int)


def test_it_says_when_nothing_comes_any_more_and_when_the_run_is_over(tmp_path):
    run = write_run(tmp_path, "healthy", Shape(done=100))
    os.utime(run / "metrics.jsonl", (time.time() - 3700,) * 2)
    assert re.search(r"nothing new for 1:0[1-9]:\d\d\b", drawn(Watch(run).look()))
    assert "the run is over" in drawn(Watch(write_run(tmp_path, "healthy", name="done")).look())


def test_a_run_without_any_line_yet(tmp_path):
    run = write_run(tmp_path, "healthy", Shape(done=0))
    assert "no expert load is recorded yet" in drawn(Watch(run).look())
    for name in ("metrics.jsonl", "expert_load.jsonl"):
        (run / name).unlink()
    assert "step   0/400" in drawn(Watch(run).look())


def test_it_follows_the_run_to_its_end_and_then_leaves(tmp_path, monkeypatch):
    """Between two frames the run goes on by one window."""
    whole = write_run(tmp_path / "whole", "healthy", Shape(steps=30))
    run = write_run(tmp_path, "healthy", Shape(steps=30, done=0))
    loads, metrics = ExpertLoadReader(whole / "expert_load.jsonl"), MetricsReader(whole / "metrics.jsonl")
    loads.poll()
    metrics.poll()
    load_file = ExpertLoadFile(run / "expert_load.jsonl", 0, 0)
    left = list(zip(loads.windows(), metrics.rows(), strict=True))

    def go_on(_: float) -> None:
        window, row = left.pop(0)
        load_file.write(window)
        with MetricsFile(run / "metrics.jsonl", window.step, 0) as file:
            file.write(window.step, 0, {name: v for name, v in row.items() if name.startswith(("train/lm", "balance"))})

    monkeypatch.setattr(top_module.time, "sleep", go_on)
    console = Console(file=io.StringIO(), width=100, height=30, force_terminal=True, color_system=None)
    assert top(run, once=False, console=console) == 0
    load_file.close()
    assert left == []
    text = console.file.getvalue()
    for step in (10, 20, 30):
        assert re.search(rf"steps {step - 9} to {step}\b", text)
    assert text.index("running") < text.index("the run is over")


def test_once_draws_one_frame_of_a_run_that_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(top_module.time, "sleep", lambda _: pytest.fail("waited"))
    console = Console(file=io.StringIO(), width=100, color_system=None)
    assert top(write_run(tmp_path, "healthy", Shape(done=50)), once=True, console=console) == 0
    assert console.file.getvalue().count("step  50/400") == 1


def test_a_file_gets_one_frame_of_a_run_that_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(top_module.time, "sleep", lambda _: pytest.fail("waited"))
    console = Console(file=io.StringIO(), width=100)
    assert top(write_run(tmp_path, "healthy", Shape(done=50)), once=False, console=console) == 0
    assert console.file.getvalue().count("step  50/400") == 1


def test_the_busiest_rank_is_told_in_eighty_columns(tmp_path):
    shape = Shape(num_layers=8, num_experts=128, steps=400_000, done=200_000, log_every=20_000)
    assert re.search(r"busiest rank \d\.\d\dx", drawn(Watch(write_run(tmp_path, "collapsing", shape)).look(), 80))


def test_ctrl_c_leaves_a_real_terminal_as_it_was(tmp_path):
    run = write_run(tmp_path, "healthy", Shape(done=50))
    code = "import signal, sys; from pathlib import Path; from rich.console import Console\n"
    code += "from moetrain.monitor.top import top\n"
    code += "signal.signal(2, signal.default_int_handler)\n"  # a shell's background jobs, and theirs, ignore it
    code += f"sys.exit(top(Path({str(run)!r}), False, Console()))"
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ) as child:
        os.close(theirs)
        text = _read_until(ours, "busiest rank")
        child.send_signal(2)
        text += _read_until(ours, "\x1b[?25h")
        assert child.wait(200) == 0
    os.close(ours)
    assert "Traceback" not in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor is there again"


def _read_until(file: int, mark: str) -> str:
    text, until = "", time.monotonic() + 200
    while mark not in text and time.monotonic() < until:
        if select.select([file], [], [], 1.0)[0]:
            try:
                text += os.read(file, 65536).decode(errors="replace")
            except OSError:  # the other side of a pseudo terminal is gone
                break
    assert mark in text, text
    return text


def test_what_is_wrong_with_a_run_is_said_in_words(tmp_path):
    with pytest.raises(ConfigError, match=r"run\.json"):
        Watch(tmp_path)
    run = write_run(tmp_path, "healthy", Shape(done=50))
    with (run / "expert_load.jsonl").open("a") as file:
        file.write("{oops}\n")
    with pytest.raises(ConfigError, match=r"expert_load\.jsonl, line 7"):
        Watch(run).look()


def test_a_window_where_nothing_was_routed(tmp_path):
    view = Watch(write_run(tmp_path, "healthy", Shape(done=50))).look()
    empty = replace(view.window, assigned_LE=view.window.assigned_LE * 0, kept_LE=view.window.kept_LE * 0)
    assert "none" in drawn(replace(view, window=empty))
