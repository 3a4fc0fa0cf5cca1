"""The saved view names nothing that a run does not log, and a run logs no more keys the more experts it has."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moetrain.monitor.charts import CHARTS
from moetrain.monitor.jsonl import read_metrics
from moetrain.monitor.wandb import SUMMARIES
from tests.wandb_files import wandb_records

REPOSITORY = Path(__file__).parents[1]
TINY = (
    "recipe=quickstart model=nano model.context=32 engine=local engine.ep_size=1 dispatch=local train.steps=2 "
    "train.global_batch=2 train.micro_batch=2 train.eval_batches=1 train.sample_tokens=0 optim.warmup_steps=1 "
    "monitor=wandb_offline monitor.log_every=1 monitor.progress=false machine.device=cpu"
)
# Of runs with more than one rank, and of routers with a loss of their own.
ELSEWHERE = {
    "control/balance_coef",
    "control/capacity_factor",
    "control/restarts",
    "control/shadowed",
    "balance/domain_divergence_mean",
    "time/exchange_seconds",
    "train/own_loss",
}


def moetrain(folder: Path, *words: str) -> None:
    """In a process of its own: wandb starts a service, and wandb-workspaces warns when it is imported."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and k not in ("RANK", "WORLD_SIZE")}
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), clean.get("PYTHONPATH")]))
    environment = clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "moetrain", *words]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two runs that differ in the number of experts."""
    folder = tmp_path_factory.mktemp("runs")
    for experts in ("e8", "e64"):
        words = [*TINY.split(), f"experts={experts}", f"run.id={experts}", f"data.cache={folder / 'cache'}"]
        moetrain(folder, "train", *words)
    return folder / "outputs"


def logged(run: Path) -> set[str]:
    """The names that wandb has of a run; of a picture or a histogram the part before the dot."""
    (folder,) = run.glob("wandb/offline-run-*")
    items = [record["history"]["item"] for record in wandb_records(folder) if record["type"] == "history"]
    return {key.split(".")[0] for item in items for key in item}


def panels(view: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for section in view["spec"]["section"]["panelBankConfig"]["sections"]:
        for panel in section["panels"]:
            yield panel["config"]


def test_every_name_in_the_view_is_logged_by_a_run(runs: Path, tmp_path: Path) -> None:
    moetrain(tmp_path, "wandb-setup", "--entity", "me", "--project", "tried", "--dump", "view.json")
    view = json.loads((tmp_path / "view.json").read_text())
    assert (view["entity"], view["project"], view["displayName"]) == ("me", "tried", "MoE balance")
    keys = logged(runs / "e8")
    shown = list(panels(view))
    assert len(shown) > 10
    for panel in shown:
        names = [*panel.get("metrics", []), *panel.get("mediaKeys", [])]
        assert set(names) <= keys, panel
        if "metricRegex" in panel:
            assert panel["useMetricRegex"] is True
            assert any(re.search(panel["metricRegex"], key) for key in keys), panel
        assert names or "metricRegex" in panel, panel
        assert panel.get("xAxis", "train/step") == "train/step"
    assert view["spec"]["section"]["settings"]["xAxis"] == "train/step"


def test_every_curve_of_the_report_and_every_summary_is_logged_by_a_run(runs: Path) -> None:
    curves = {curve.name for chart in CHARTS for curve in chart.curves}
    assert curves | SUMMARIES.keys() <= logged(runs / "e8") | ELSEWHERE


def test_the_number_of_keys_does_not_grow_with_the_number_of_experts(runs: Path) -> None:
    few, many = logged(runs / "e8"), logged(runs / "e64")
    assert few == many
    assert {"moe/layer_00/load_hist", "moe/layer_00/load_max", "moe/load_heatmap", "moe/drop_heatmap"} <= few
    written = [{key for row in read_metrics(runs / run / "metrics.jsonl") for key in row} for run in ("e8", "e64")]
    assert written[0] == written[1] > {"balance/load_max"}
