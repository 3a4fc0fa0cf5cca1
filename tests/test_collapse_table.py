"""launch/collapse.py: what it reads out of a run, and the table it makes of several."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from moetrain.compose import compose
from moetrain.monitor.events import EventsFile
from moetrain.monitor.jsonl import MetricsFile
from moetrain.monitor.runfolder import RunFolder

SCRIPT = Path(__file__).parents[1] / "launch" / "collapse.py"
RECIPE = ["recipe=collapse", "debug=collapsed_router", "control=all"]


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("collapse", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["collapse"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def made_up(folder: RunFolder) -> None:
    folder.path.mkdir()
    metrics, events = MetricsFile(folder.metrics, 0, 0), EventsFile(folder.events, 0)
    for step, effective in ((10, 2.0), (20, 5.0), (30, 7.0)):
        names = ("load_max", "effective_experts_min", "max_vio_mean", "drop_fraction")
        row = {f"balance/{name}": 0.25 for name in names}
        metrics.write(step, step, row | {"balance/effective_experts_mean": effective})
    metrics.write(30, 30, {"validation/lm_loss": 4.5})
    events.write(10, "control", "", {"what": "experts", "layer": 0, "experts": [2, 3], "from": [0, 1]})
    events.write(10, "control", "", {"what": "balance_coef", "old": 0.1, "new": 0.2})
    events.write(10, "alert", "", {})
    metrics.close()
    events.close()


def test_a_run_is_read_and_the_table_has_a_row_for_every_variant(tmp_path: Path) -> None:
    collapse, config, folder = script(), compose(RECIPE), RunFolder(tmp_path / "it")
    assert not collapse._is_done(folder, 30)
    made_up(folder)
    assert collapse._is_done(folder, 30)
    assert not collapse._is_done(folder, 40)
    outcome = collapse._outcome(folder, config)
    assert (outcome.loss, outcome.effective, outcome.worst, outcome.dropped) == (4.5, 7.0, 0.25, 0.25)
    assert (outcome.experts_step, outcome.restarts, outcome.settings) == (20, 2, 1)
    text = collapse._markdown(config, {name: [outcome, outcome] for name in collapse.VARIANTS}, ["python", "it"])
    for name, own in collapse.VARIANTS.items():
        assert f"| {name} | 4.500 (4.500 .. 4.500) | 7.00 (7.00 .. 7.00) |" in text
        assert f"- `{name}`: `{' '.join(own)}`" in text
    assert text.count("| 20 | 2 | 1 |") == len(collapse.VARIANTS)


def test_every_variant_composes() -> None:
    for own in script().VARIANTS.values():
        assert compose(["recipe=collapse", *own]).recipe.name == "collapse"
