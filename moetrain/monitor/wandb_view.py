"""``moetrain wandb-setup``: the saved view "MoE balance" of a wandb project, as code.

The only file that imports wandb-workspaces. Building and writing the view down need neither a key nor a network; only
publishing does. Histograms of the load have no kind of panel there: wandb shows them in a run's own workspace.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain.monitor.jsonl import STEP
from moetrain.types import ConfigError, Problem

NAME = "MoE balance"
EXTRA = "pip install 'moetrain[wandb]'"


@dataclass(frozen=True)
class Lines:
    """Curves over steps: metrics by name, and all metrics that ``regex`` matches."""

    title: str
    names: tuple[str, ...] = ()
    regex: str | None = None


@dataclass(frozen=True)
class Pictures:
    """The pictures of one name, with a slider over steps."""

    title: str
    name: str


def _layers(title: str, name: str) -> Lines:
    """One curve a layer."""
    return Lines(f"{title}, by layer", regex=f"^moe/layer_[0-9]+/{name}$")


SECTIONS: Mapping[str, tuple[Lines | Pictures, ...]] = {
    "Expert load": (
        Pictures("Load over the fair share, layer x expert", "moe/load_heatmap"),
        Pictures("Dropped, layer x expert", "moe/drop_heatmap"),
    ),
    "Balance": (
        Lines("Worst expert, times the fair share", ("balance/load_max",)),
        Lines("Dropped", ("balance/drop_fraction",)),
        Lines("Effective experts", ("balance/effective_experts_mean", "balance/effective_experts_min")),
        Lines("Dead experts", ("balance/dead_experts", "balance/dead_running")),
        Lines("MaxVio", ("balance/max_vio_mean", "balance/max_vio_max", "balance/max_vio_running")),
        Lines("Busiest rank over the mean", ("balance/rank_load_max", "balance/received_max")),
    ),
    "Loss": (
        Lines("Cross-entropy, nats/token", ("train/lm_loss", "validation/lm_loss")),
        Lines("Router losses", ("train/balance_loss", "train/z_loss")),
        Lines("Gradient norm before clipping", ("train/grad_norm",)),
    ),
    "Layers": (
        _layers("Worst expert, times the fair share", "load_max"),
        _layers("Effective experts", "effective_experts"),
        _layers("Dropped", "drop_fraction"),
        _layers("Busiest rank, rows received", "received_max"),
        _layers("Router entropy, 1 is uniform", "router_entropy"),
        _layers("Largest router logit", "logit_max"),
    ),
    "Routers": (
        Lines("Entropy and confidence", ("balance/router_entropy", "balance/router_confidence")),
        Lines("Dropped, by choice rank", regex="^balance/drop_choice_[0-9]+$"),
        Lines("Dropped, by eighth of the sequence", regex="^balance/drop_position_[0-9]+$"),
    ),
    "Speed": (
        Lines("Tokens/s", ("perf/tokens_per_second",)),
        Lines("Seconds of a step, by phase", ("perf/step_seconds",), regex="^time/.+_seconds$"),
        Lines("MiB of rows from other ranks, busiest rank, one way", ("balance/exchange_mib_max",)),
    ),
}


def write_view(entity: str, project: str, path: Path) -> None:
    """What would be published, as JSON. Raises ConfigError if wandb-workspaces is missing or ``path`` not writable."""
    text = _workspace(entity, project)._to_model().model_dump_json(indent=1, by_alias=True, exclude_none=True)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        fix = "give a file in a folder that can be written, e.g. --dump view.json"
        raise ConfigError([Problem("--dump", str(path), error.strerror or str(error), fix)]) from None


def publish_view(entity: str, project: str) -> str:
    """Save it beside the project's other views, and return its address.

    Raises ConfigError if wandb-workspaces is missing, if there is no key, or if wandb refuses.
    """
    workspace = _workspace(entity, project)
    try:
        return str(workspace.save().url)
    except Exception as error:  # of wandb, of its transport, of the server
        reason = f"wandb did not take the view: {type(error).__name__}: {error}"
        fix = "wandb login, or set WANDB_API_KEY; without an account, --dump FILE writes the view down"
        raise ConfigError([Problem("wandb", f"{entity}/{project}", reason, fix)]) from None


def _workspace(entity: str, project: str) -> Any:
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise ConfigError([Problem("wandb-setup", None, f"needs wandb-workspaces: {error}", EXTRA)]) from None

    def panel(one: Lines | Pictures) -> Any:
        if isinstance(one, Pictures):
            return panels.MediaBrowser(title=one.title, media_keys=[one.name], num_columns=1)
        return panels.LinePlot(title=one.title, x=STEP, y=list(one.names), metric_regex=one.regex)

    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        settings=workspaces.WorkspaceSettings(x_axis=STEP),
        sections=[
            workspaces.Section(name=name, is_open=True, panels=[panel(one) for one in shown])
            for name, shown in SECTIONS.items()
        ],
    )
