"""A disk that is full in the middle of a run costs lines of its files, is said once, and never the run."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from moetrain.cli import main
from moetrain.monitor.events import read_events
from moetrain.monitor.expert_load import ExpertLoadReader
from moetrain.monitor.jsonl import MetricsFile, read_metrics
from moetrain.monitor.origin import origin
from moetrain.monitor.runfiles import RunFiles
from moetrain.monitor.runfolder import RunFolder


@contextmanager
def no_file_beyond(num_bytes: int) -> Iterator[None]:
    """A write that crosses this size is cut short there, and the next one raises OSError; as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_line_is_whole_or_not_there_and_the_next_one_is_tried(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, 0, 0) as file:
        file.write(1, 1, {"a": 1.0})
        whole = path.read_bytes()
        with no_file_beyond(len(whole) + 20):
            file.write(2, 2, {"a": 2.0})
            file.write(3, 3, {"a": 3.0})
        assert path.read_bytes() == whole, "nothing of what was cut short stays"
        assert (file.lines.lost, file.lines.failure) == (2, "File too large")
        file.write(4, 4, {"a": 4.0})
    assert [row["train/step"] for row in read_metrics(path)] == [1, 4]


def test_what_could_not_be_cut_off_is_written_over(tmp_path, monkeypatch):
    """A torn rest is longer than the line that comes next."""
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, 0, 0) as file:
        whole = path.read_bytes()
        with no_file_beyond(len(whole) + 80):
            real = file.lines._file
            monkeypatch.setattr(file.lines, "_file", Untruncatable(real))
            file.write(2, 2, {"a_name_that_makes_the_line_long_enough_for_this_test_and_then_some_more": 2.0})
            monkeypatch.setattr(file.lines, "_file", real)
        assert len(path.read_bytes()) == len(whole) + 80
        file.write(3, 3, {})
        file.write(4, 4, {"a": 4.0})
        assert [row["train/step"] for row in read_metrics(path)] == [4]


class Untruncatable:
    def __init__(self, file):
        self.seek, self.write = file.seek, file.write

    def truncate(self, size):
        raise OSError("no")


def test_a_segment_that_could_not_begin_begins_with_its_first_line(tmp_path):
    """Else a reader would take the first line of numbers for where the segment took up."""
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, 0, 0) as file:
        for step in (10, 20, 30):
            file.write(step, step, {"a": 1.0})
    with no_file_beyond(path.stat().st_size):
        again = MetricsFile(path, 10, 10)
        again.write(20, 20, {"a": 2.0})
    again.write(30, 30, {"a": 3.0})
    again.close()
    assert again.lines.lost == 1
    assert [(row["train/step"], row["a"]) for row in read_metrics(path)] == [(10, 1.0), (30, 3.0)]


def test_it_is_said_once_and_counted_over_all_segments(tmp_path):
    folder = RunFolder(tmp_path)
    files = RunFiles(folder, 0, 0)
    assert files.alarm() is None
    with no_file_beyond(0):
        for step in (1, 2):
            files.metrics.write(step, step, {"a": 1.0})
            told = files.alarm()
            assert (told is None) == (step == 2)
        files.events.write(2, "alert", "lost too", {})
    files.reopen(1, 1)
    with no_file_beyond(0):
        files.metrics.write(3, 3, {"a": 1.0})
        assert files.alarm() is None
    files.close()
    note = "lines that could not be written (File too large): 3 of metrics.jsonl, 1 of events.jsonl"
    assert files.note() == note


def train(root: Path, *more: str) -> int:
    settings = (
        "model=nano model.context=16 model.num_layers=2 model.dim=32 model.num_heads=2 model.num_kv_heads=1"
        " model.head_dim=16 model.expert_dim=16 experts=e8 engine=local train.steps=40 train.global_batch=2"
        " train.micro_batch=2 optim.warmup_steps=1 machine.device=cpu monitor.log_every=1 monitor.progress=false"
        " run.id=full data.tokenizer=byte data.validation_fraction=0.2"
    )
    (root / "a.txt").write_text(" ".join(f"{i} green bottles" for i in range(100)))
    folders = [f"data.path={root / 'a.txt'}", f"run.root={root / 'runs'}", f"data.cache={root / 'cache'}"]
    return main(["train", "data=text", *settings.split(), *folders, *more])


def test_a_run_goes_on_and_says_what_it_lost(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("moetrain.train.origin", lambda world_size: replace(origin(world_size), diff=""))
    with no_file_beyond(24_000):
        assert train(tmp_path) == 0
    told = capfd.readouterr()
    assert told.err.count("can not be written: File too large. Training goes on") == 1
    folder = RunFolder(tmp_path / "runs" / "full")
    rows = [row for row in read_metrics(folder.metrics) if "train/loss" in row]
    assert 1 <= len(rows) < 40
    assert [row["train/step"] for row in rows] == list(range(1, len(rows) + 1))
    note = f"(File too large): {40 - len(rows)} of metrics.jsonl"
    for report in (told.out, folder.report.read_text()):
        assert note in " ".join(report.split())
    alerts = [event.message for event in read_events(folder.events) if event.kind == "alert"]
    assert sum("can not be written" in text for text in alerts) == 1
    reader = ExpertLoadReader(folder.expert_load)
    reader.poll()
    assert reader.windows()


def test_a_report_that_can_not_be_written_is_said(tmp_path, capfd, monkeypatch):
    """It has been printed already."""

    def full(report, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moetrain.monitor.recorder.write_report", full)
    assert train(tmp_path, "train.steps=2") == 0
    told = capfd.readouterr()
    assert "Training is done" in told.out
    assert "report.txt can not be written: No space left on device" in told.err
