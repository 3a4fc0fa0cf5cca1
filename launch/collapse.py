"""Train recipes/collapse.yaml with and without corrections, and write one table.

    python launch/collapse.py --seeds 3 --out outputs/collapse

Runs that are done are not done again. The table goes to OUT/collapse.md.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moetrain.compose import compose
from moetrain.config import Config
from moetrain.monitor.events import read_events
from moetrain.monitor.jsonl import STEP, read_metrics
from moetrain.monitor.runfolder import RunFolder
from moetrain.survey.results import Spread, spread

AFTER = "control.revive_after_steps=20"
PLANT = "debug=collapsed_router"
VARIANTS = {
    "collapsed": (PLANT, "control=none"),
    "aux": (PLANT, "control=aux"),
    "revive": (PLANT, "control=revive", AFTER),
    "all": (PLANT, "control=all", AFTER),
    "healthy": ("debug=none", "control=none"),
}
ABOUT = """\
- `collapsed`: the plant, and nothing done about it. `healthy`: the same run without the plant.
- Loss is validation cross-entropy in nats per token after the last step. Effective experts are exp(entropy of the
  load), of 8, mean over layers: of the window that ends with the last step, and of the layer that has fewest. MaxVio is
  max_e c_e / mean(c) - 1 with c the assignments of that window before dropping, mean over layers.
- Restarts: experts restarted, all layers and windows together. Settings: changes of a coefficient or a capacity factor.
- Means over the seeds, lowest and highest in brackets. A seed sets the order of the data and the initial weights."""


@dataclass(frozen=True)
class Outcome:
    """Of one run; see ``ABOUT``. experts_step: the first window in which more than half of the experts were at work."""

    loss: float
    effective: float
    worst: float
    max_vio: float
    dropped: float
    experts_step: float | None
    restarts: int
    settings: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("outputs/collapse"))
    parser.add_argument("overrides", nargs="*", help="of every run, such as train.steps=100")
    asked = parser.parse_args()
    outcomes: dict[str, list[Outcome]] = {name: [] for name in VARIANTS}
    for seed in range(asked.seeds):
        for name, own in VARIANTS.items():
            run = f"{name.replace(' ', '_')}-seed{seed}"
            overrides = ["recipe=collapse", *own, *asked.overrides]
            settings = [f"run.seed={seed}", f"run.id={run}", f"run.root={asked.out}", "monitor.progress=false"]
            config = compose([*overrides, *settings])
            outcomes[name].append(_trained(config, [*overrides, *settings]))
            print(f"{run}: {outcomes[name][-1]}", flush=True)
    words = ["python", "launch/collapse.py", "--seeds", str(asked.seeds), *asked.overrides]
    table = asked.out / "collapse.md"
    table.write_text(_markdown(compose(["recipe=collapse", *asked.overrides]), outcomes, words), encoding="utf-8")
    print(f"table in {table}")
    return 0


def _trained(config: Config, overrides: Sequence[str]) -> Outcome:
    assert config.run.id is not None
    folder = RunFolder(Path(config.run.root) / config.run.id)
    if not _is_done(folder, config.train.steps):
        ranks = ["--standalone", "--nproc-per-node", str(config.recipe.world)]
        command = [sys.executable, "-m", "torch.distributed.run", *ranks, "-m", "moetrain", "train", *overrides]
        log = folder.path.with_name(f"{folder.id}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as text:
            subprocess.run(command, stdout=text, stderr=subprocess.STDOUT, check=True)
    return _outcome(folder, config)


def _is_done(folder: RunFolder, steps: int) -> bool:
    if not folder.metrics.exists():
        return False
    rows = read_metrics(folder.metrics)
    return bool(rows) and rows[-1][STEP] == steps and "validation/lm_loss" in rows[-1]


def _outcome(folder: RunFolder, config: Config) -> Outcome:
    rows = read_metrics(folder.metrics)
    windows = [row for row in rows if "balance/load_max" in row]
    half = config.experts.num_experts / 2
    alive = [row[STEP] for row in windows if row["balance/effective_experts_mean"] > half]
    acts = [event.data for event in read_events(folder.events) if event.kind == "control"]
    kinds = Counter(str(data["what"]) for data in acts)
    return Outcome(
        loss=rows[-1]["validation/lm_loss"],
        effective=windows[-1]["balance/effective_experts_mean"],
        worst=windows[-1]["balance/effective_experts_min"],
        max_vio=windows[-1]["balance/max_vio_mean"],
        dropped=windows[-1]["balance/drop_fraction"],
        experts_step=alive[0] if alive else None,
        restarts=sum(len(data["experts"]) for data in acts if data["what"] == "experts"),
        settings=sum(number for what, number in kinds.items() if what != "experts"),
    )


def _markdown(config: Config, outcomes: dict[str, list[Outcome]], words: Sequence[str]) -> str:
    train, model = config.train, config.model
    tokens = train.steps * train.global_batch * model.context
    head = ["run", "loss", "effective experts", "of the worst layer", "MaxVio", "dropped"]
    head += ["over half at work from step", "restarts", "settings"]
    lines = [head, ["---"] * len(head), *([name, *_cells(runs)] for name, runs in outcomes.items())]
    seeds = len(next(iter(outcomes.values())))
    setting = (
        f"Every router starts with a bias that sends all tokens to experts 0 and 1 of {config.experts.num_experts}."
        f" {model.num_layers} layers, {train.steps} steps, {tokens:,} tokens of {config.data.source},"
        f" {config.recipe.world} ranks with half of the experts each, {seeds} seed(s)."
    )
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    overrides = "\n".join(f"- `{name}`: `{' '.join(own)}`" for name, own in VARIANTS.items())
    title = "# A planted collapse, with and without corrections"
    started = f"What each was started with, over `recipe=collapse`:\n\n{overrides}"
    parts = [title, f"```bash\n{' '.join(words)}\n```", setting, table, ABOUT, started]
    return "\n\n".join(parts) + "\n"


def _cells(runs: Sequence[Outcome]) -> list[str]:
    columns = [("loss", ".3f"), ("effective", ".2f"), ("worst", ".2f"), ("max_vio", ".2f"), ("dropped", ".1%")]
    cells = [_text(spread([getattr(run, name) for run in runs]), form) for name, form in columns]
    steps = [run.experts_step for run in runs if run.experts_step is not None]
    cells.append(f"{statistics.median(steps):g}" if len(steps) == len(runs) else f"{len(steps)} of {len(runs)} ever")
    return [
        *cells,
        *(f"{statistics.fmean(getattr(run, name) for run in runs):.3g}" for name in ("restarts", "settings")),
    ]


def _text(value: Spread, form: str) -> str:
    mean = format(value.mean, form)
    return mean if value.std is None else f"{mean} ({format(value.low, form)} .. {format(value.high, form)})"


if __name__ == "__main__":
    sys.exit(main())
