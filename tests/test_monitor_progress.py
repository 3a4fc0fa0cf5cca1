"""The line a user watches: on a terminal, and in a log file."""

from __future__ import annotations

import io

import pytest

from moetrain.monitor import progress as progress_module
from moetrain.monitor.progress import Progress, Status, clock, line, thousands

FULL = Status(
    120, 1000, loss=4.3214, tokens_per_second=18_340.0, seconds_left=151.0, drop_fraction=0.0123, load_max=1.431
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def screen(text: str) -> list[str]:
    """What a terminal would show: a line is overwritten from its start after a carriage return."""
    shown = []
    for row in text.split("\n"):
        parts = row.split("\r\x1b[2K")
        assert "\r" not in parts[-1]
        assert "\x1b" not in parts[-1]
        shown.append(parts[-1])
    return shown


@pytest.fixture
def columns(monkeypatch):
    size = [120]
    monkeypatch.setattr(progress_module.shutil, "get_terminal_size", lambda: type("Size", (), {"columns": size[0]}))
    monkeypatch.setattr(progress_module, "REDRAW_S", 0.0)
    return size


def test_the_line_has_everything():
    expected = "step  120/1000  loss 4.321  18.3k tokens/s  ETA 2:31  drop 1.2%  worst expert 1.43x"
    assert line(FULL) == expected


def test_unknown_numbers_are_left_out():
    assert line(Status(1, 20, loss=6.0)) == "step  1/20  loss 6.000"


def test_a_file_gets_one_plain_line_every_log_interval_and_the_last_step():
    stream = io.StringIO()
    progress = Progress(stream, log_every=10)
    for step in range(1, 26):
        progress.update(Status(step, 25, loss=1.0))
    progress.say("saved step 25")
    progress.close()
    text = stream.getvalue()
    assert [row.split("  ")[0] for row in text.splitlines()] == [
        "step 10/25",
        "step 20/25",
        "step 25/25",
        "saved step 25",
    ]
    assert text.isprintable() or set(filter(lambda c: not c.isprintable(), text)) == {"\n"}


def test_a_terminal_shows_one_line_that_is_overwritten(columns):
    stream = Terminal()
    progress = Progress(stream, log_every=10)
    for step in range(1, 4):
        progress.update(Status(step, 4, loss=2.0))
    assert screen(stream.getvalue()) == ["step 3/4  " + "━" * 18 + "─" * 6 + "  loss 2.000"]
    progress.say("validation loss 2.1")
    assert screen(stream.getvalue()) == ["validation loss 2.1", "step 3/4  " + "━" * 18 + "─" * 6 + "  loss 2.000"]
    progress.update(Status(4, 4, loss=1.5))
    progress.close()
    assert screen(stream.getvalue())[1:] == ["step 4/4  " + "━" * 24 + "  loss 1.500", ""]


@pytest.mark.parametrize("width", [20, 60, 84, 90, 100, 200])
def test_the_line_never_wraps(columns, width):
    columns[0] = width
    stream = Terminal()
    Progress(stream, log_every=10).update(FULL)
    (shown,) = screen(stream.getvalue())
    assert len(shown) < width
    assert ("━" in shown) == (width >= 100)


def test_redraws_are_limited_but_the_last_step_is_drawn(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress_module, "monotonic", lambda: now[0])
    stream = Terminal()
    progress = Progress(stream, log_every=10)
    for step in range(1, 1001):
        now[0] += 0.001
        progress.update(Status(step, 1000))
    assert 9 <= stream.getvalue().count("\r") <= 12
    assert screen(stream.getvalue())[0].startswith("step 1000/1000")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (75, "1:15"), (3599.7, "1:00:00"), (3675, "1:01:15"), (90_000, "1d 1:00:00")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(999, "999"), (1234, "1.2k"), (1.25e6, "1.2M"), (3e9, "3.0G")])
def test_thousands(value, text):
    assert thousands(value) == text
