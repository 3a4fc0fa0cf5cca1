"""wandb can do what it likes and training does not notice; what an offline run holds, read with its own tool."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moetrain.monitor import wandb as monitor_wandb
from moetrain.monitor.heatmap import DROP, FAIR, LOAD, MUCH, NO_TOKENS, NOTHING, OVERLOADED, STARVED, colour, heatmap
from moetrain.monitor.recorder import CorpusFacts, Recorder
from moetrain.monitor.runfolder import RunFolder
from moetrain.monitor.wandb import NUM_PICTURES, SUMMARIES, LayerLoad, WandbLogger, WandbSettings, is_picture_step
from tests.tiny import alone, tiny
from tests.wandb_files import wandb_records, wandb_summary

ASSIGNED_LE, KEPT_LE = np.array([[4, 0, 2, 2], [1, 1, 1, 1]]), np.array([[2, 0, 2, 1], [1, 1, 1, 1]])
COUNTS = LayerLoad(step=2, tokens=64, assigned_LE=ASSIGNED_LE, kept_LE=KEPT_LE, layers=(1, 3))


def settings(folder: Path, timeout_s: float = 100.0) -> WandbSettings:
    return WandbSettings("offline", "moetrain-tests", None, "run-1", folder, {"k": 2}, 60.0, timeout_s)


class FakeRun:
    def __init__(self, log=None, finish=None):
        self.logged, self.metrics, self.alerts, self.finished = [], [], [], False
        self._log, self._finish = log, finish

    def define_metric(self, name, step_metric, summary=None):
        self.metrics.append((name, step_metric, summary))

    def alert(self, title, text, level, wait_duration):
        assert 0 < wait_duration < 0.01, "a second diagnosis of the same step would be kept back"
        self.alerts.append((title, text, level))

    def log(self, record, **options):
        assert not options, "never a step="
        if self._log is not None:
            self._log(record)
        self.logged.append(record)

    def finish(self):
        if self._finish is not None:
            self._finish()
        self.finished = True


def inject(monkeypatch, run: FakeRun, init=None):
    def default_init(**options):
        return run

    fake = SimpleNamespace(
        init=init or default_init,
        Settings=lambda **options: options,
        Histogram=lambda np_histogram: ("histogram", *np_histogram),
        Image=lambda data: ("image", data),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)


def test_records_arrive_in_order_with_an_explicit_step(monkeypatch, tmp_path):
    run = FakeRun()
    inject(monkeypatch, run)
    logger = WandbLogger(settings(tmp_path))
    logger.scalars(1, 32, {"train/loss": 4.0})
    logger.load(COUNTS)
    logger.alert("x" * 70, "words", "WARN")
    outcome = logger.close()
    assert (outcome.sent, outcome.lost, outcome.failure) == (3, 0, None)
    assert run.metrics[0] == ("*", "train/step", None)
    assert {name: summary for name, _, summary in run.metrics[1:]} == SUMMARIES
    assert run.alerts == [("x" * 63, "words", "WARN")]
    assert run.logged[0] == {"train/step": 1, "train/tokens": 32, "train/loss": 4.0}
    kind, counts_E, edges = run.logged[1]["moe/layer_01/load_hist"]
    assert (kind, counts_E.tolist(), edges.tolist()) == ("histogram", [4, 0, 2, 2], [0, 1, 2, 3, 4])
    for name, (row, column), expected in (
        ("moe/load_heatmap", (0, 0), OVERLOADED),
        ("moe/load_heatmap", (1, 3), FAIR),
        ("moe/drop_heatmap", (0, 0), MUCH),
        ("moe/drop_heatmap", (0, 1), NO_TOKENS),
        ("moe/drop_heatmap", (1, 3), NOTHING),
    ):
        assert tuple(run.logged[1][name][1][32 + 40 * row + 20, 80 + 40 * column + 20]) == expected, (name, row, column)
    assert run.logged[1]["train/step"] == 2
    assert run.finished


def test_a_number_that_is_not_finite_spoils_no_summary(monkeypatch, tmp_path):
    run = FakeRun()
    inject(monkeypatch, run)
    logger = WandbLogger(settings(tmp_path))
    logger.scalars(1, 32, {"train/lm_loss": math.nan, "train/loss": math.nan, "balance/load_max": math.inf})
    assert logger.close().lost == 0
    assert list(run.logged[0]) == ["train/step", "train/tokens", "train/loss"]


def test_an_alarm_of_the_trainer_is_an_alert(monkeypatch, tmp_path):
    run = FakeRun()
    inject(monkeypatch, run)
    config = tiny(monitor__wandb="offline", monitor__progress=False)
    folder = RunFolder(tmp_path / "first-try")
    folder.path.mkdir()
    recorder = Recorder(config, alone(), CorpusFacts(64, 4.0, 3.0, 4.0), folder, 0)
    recorder.alarm(3, "the disk is full")
    recorder.close(None, (), None)
    assert run.alerts == [("first-try at step 3", "the disk is full", "ERROR")]


def test_wandb_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    logger = WandbLogger(settings(tmp_path))
    logger.scalars(1, 32, {"train/loss": 4.0})
    outcome = logger.close()
    assert (outcome.sent, outcome.lost) == (0, 1)
    assert outcome.failure.startswith("start: ModuleNotFoundError")


def test_wandb_failing_at_init(monkeypatch, tmp_path):
    def init(**options):
        raise RuntimeError("no network")

    inject(monkeypatch, FakeRun(), init)
    logger = WandbLogger(settings(tmp_path))
    for step in range(3):
        logger.scalars(step, 0, {})
    outcome = logger.close()
    assert (outcome.sent, outcome.lost, outcome.failure) == (0, 3, "start: RuntimeError: no network")


def test_wandb_raising_in_log_loses_that_record_only(monkeypatch, tmp_path):
    def log(record):
        if record["train/step"] == 1:
            raise RuntimeError("broken pipe")

    run = FakeRun(log)
    inject(monkeypatch, run)
    logger = WandbLogger(settings(tmp_path))
    for step in range(3):
        logger.scalars(step, 0, {})
    outcome = logger.close()
    assert (outcome.sent, outcome.lost, outcome.failure) == (2, 1, "log: RuntimeError: broken pipe")
    assert run.finished


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_wandb_hanging_never_stops_training(monkeypatch, tmp_path, where):
    """A queue of records is kept, the rest dropped and counted; nothing waits but ``close``, and not for long."""
    release = threading.Event()

    def hang(*_, **__):
        release.wait(60)

    run = FakeRun(hang if where == "log" else None, hang if where == "finish" else None)
    inject(monkeypatch, run, (lambda **options: (hang(), run)[1]) if where == "init" else None)
    monkeypatch.setattr(monitor_wandb, "QUEUE_SIZE", 8)
    logger = WandbLogger(settings(tmp_path, timeout_s=0.3))
    began = time.monotonic()
    for step in range(1000 if where != "finish" else 5):
        logger.scalars(step, 0, {"train/loss": 1.0})
    put = time.monotonic() - began
    outcome = logger.close()
    waited = time.monotonic() - began
    release.set()
    logger._thread.join(60)
    assert put < 10.0, "a thousand calls: hardly one of them waits, be it for the time limit of 0.3 s"
    assert waited < 30.0, "nobody waits for what hangs for 60 s"
    assert outcome.failure == "finish: TimeoutError: not done after 0.3 s"
    assert (outcome.sent, outcome.lost) == ((5, 0) if where == "finish" else (0, 1000))


@pytest.mark.parametrize(("steps", "log_every"), [(20, 1), (300, 10), (10_000, 10), (100_000, 7), (999, 1)])
def test_pictures_come_at_a_bounded_rate(steps, log_every):
    pictures = [step for step in range(1, steps + 1) if is_picture_step(step, steps, log_every)]
    assert min(steps // log_every, NUM_PICTURES // 2) <= len(pictures) <= NUM_PICTURES
    assert all(step % log_every == 0 for step in pictures)


def test_the_scale_is_fixed_and_diverges_from_the_fair_share():
    assert [colour(x) for x in (0.0, 1.0, 2.0, 7.0, float("nan"))] == [STARVED, FAIR, OVERLOADED, OVERLOADED, NO_TOKENS]


def test_what_was_dropped_has_a_scale_of_its_own_up_to_a_half():
    half = tuple(round((a + b) / 2) for a, b in zip(NOTHING, MUCH, strict=True))
    assert [DROP.colour(x) for x in (0.0, 0.25, 0.5, 1.0, float("nan"))] == [NOTHING, half, MUCH, MUCH, NO_TOKENS]


@pytest.mark.parametrize(("num_layers", "num_experts"), [(1, 2), (4, 8), (48, 256), (60, 512)])
def test_every_cell_of_the_heat_map_has_its_colour(num_layers, num_experts):
    relative_LE = np.linspace(0.0, 2.2, num_layers * num_experts).reshape(num_layers, num_experts)
    picture = heatmap(relative_LE, range(num_layers), "title", LOAD)
    cell = max(4, min(40, 960 // num_experts))
    row = max(18, cell)
    for i in range(num_layers):
        for j in range(num_experts):
            pixel = picture[32 + i * row + row // 2, 80 + j * cell + cell // 2]
            assert tuple(pixel) == colour(relative_LE[i, j]), (i, j)
    assert max(picture.shape) < 2200


WRITER = """
import sys
from pathlib import Path
import numpy as np
from moetrain.monitor.wandb import LayerLoad, WandbLogger, WandbSettings
folder, first = Path(sys.argv[1]), int(sys.argv[2])
logger = WandbLogger(WandbSettings("offline", "moetrain-tests", None, "run-1", folder, {"router": {"top_k": 2}}))
for step in range(first, first + 3):
    logger.scalars(step * 10, step * 640, {"train/lm_loss": 5.0 - step, "balance/load_max": 9.5 - abs(4 - step)})
logger.scalars(40, 2560, {"train/lm_loss": float("nan"), "train/loss": 2.0})
counts_LE = np.array([[4, 0, 2, 2], [1, 1, 1, 1]])
logger.load(LayerLoad(40, 2560, counts_LE, counts_LE, (1, 3)))
logger.alert("collapse", "layer 3 uses 2 experts", "ERROR")
print(logger.close())
"""


def test_an_offline_run_holds_what_was_logged(tmp_path):
    """In a process of its own, as training runs it: wandb starts a service that it ends with the process."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    for first in ("1", "3"):  # the second life of the run goes back over step 30
        done = subprocess.run([*command, first], capture_output=True, text=True, timeout=240, env=clean, check=False)
        assert done.stdout.strip() == "WandbOutcome(sent=6, lost=0, failure=None)", done.stderr
    assert done.stderr == ""
    runs = sorted((tmp_path / "wandb").glob("offline-run-*-run-1"))
    records = [record for run in runs for record in wandb_records(run)]
    config = next(record["run"]["config"]["update"] for record in records if record["type"] == "run")
    assert config["router"] == {"top_k": 2}
    metric = next(record["metric"] for record in records if record["type"] == "metric")
    assert (metric["glob_name"], metric["step_metric"]) == ("*", "train/step")
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [item["train/step"] for item in history] == [10, 20, 30, 40, 40, 30, 40, 50, 40, 40]
    assert [item.get("train/lm_loss") for item in history] == [4, 3, 2, None, None, 2, 1, 0, None, None]
    assert history[4]["moe/layer_01/load_hist.values"] == [4, 0, 2, 2]
    assert history[4]["moe/layer_03/load_hist.bins"] == [0, 1, 2, 3, 4]
    for name in ("moe/load_heatmap", "moe/drop_heatmap"):
        assert (runs[0] / "files" / history[4][f"{name}.path"]).is_file()
    alerts = [record["alert"] for record in records if record["type"] == "alert"]
    assert [(one["level"], one["title"], one["text"]) for one in alerts] == [
        ("ERROR", "collapse", "layer 3 uses 2 experts")
    ] * 2
    summary = wandb_summary(runs[1])
    assert summary["train/lm_loss"] == {"min": 0, "last": 0}
    assert summary["balance/load_max"] == {"max": 9.5, "last": 8.5}
