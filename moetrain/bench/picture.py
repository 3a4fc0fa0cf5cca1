"""Results of ``bench layer``, ``ep``, ``dispatch`` and ``skew`` as bars: how many times as long as ours each one took.

A row of panels for each shape on each machine, a panel for each routing. Of a shape that was timed more than once, the
last run of each routing is shown.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moetrain.bench.routing import ROUTINGS
from moetrain.types import ConfigError, Problem

LAYER = ("timed", "dtype", "experts", "top_k", "dim", "expert_dim", "tokens")
SHAPE = (*LAYER, "ranks", "threads", "machine", "cores", "device", "torch", "gemm", "allocator")
TITLE = "Time of one MoE layer, forward and backward, as a multiple of ours (orange: quicker than ours)"
TIMED = {"layer": "", "exchange": "exchange without experts: ", "skew": "a hot rank, as a multiple of balanced: "}
FORMATS = (".png", ".svg", ".pdf")
WIDTH, BAR, HEAD = 13.0, 0.27, 1.15
OURS, THEIRS, QUICKER, LINE = "#1b6ca8", "#b9c4cf", "#e0975c", "#333333"
Row = dict[str, Any]
Runs = dict[tuple[Any, ...], dict[str, list[Row]]]


def read_results(path: Path) -> Runs:
    """By shape, then by routing: the rows of the last run, ours first. Raises ConfigError if the file is no such."""
    runs: Runs = {}
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        for row in rows:
            routing = "skewed" if row["timed"] == "skew" else row["routing"]  # balanced there is what it is measured by
            found = runs.setdefault(tuple(row[name] for name in SHAPE), {}).setdefault(routing, [])
            if found and found[0]["at"] != row["at"]:
                found.clear()
            found.append(row)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"holds no results: {type(error).__name__}: {error}"
        fix = "name a file that moetrain bench layer --out has written"
        raise ConfigError([Problem("results", str(path), reason, fix)]) from error
    if not runs:
        raise ConfigError([Problem("results", str(path), "is empty", "write it: moetrain bench layer --out FILE")])
    return runs


def draw(runs: Runs, path: Path) -> None:
    """Write the picture; the ending of ``path`` says in which format. Raises ConfigError for others, and where
    matplotlib is missing.
    """
    if path.suffix not in FORMATS:
        reason, fix = "is in a format that isn't drawn", f"choose of {', '.join(FORMATS)}"
        raise ConfigError([Problem("--out", str(path), reason, fix)])
    if find_spec("matplotlib") is None:
        reason, fix = "needs the package matplotlib", "install it: pip install 'moetrain[bench]'"
        raise ConfigError([Problem("command", "bench picture", reason, fix)])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure_of(runs).savefig(path, dpi=110)


def figure_of(runs: Runs) -> Any:
    """matplotlib's Figure."""
    from matplotlib.figure import Figure

    heights = [HEAD + BAR * max(map(len, by_routing.values())) for by_routing in runs.values()]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.5), layout="constrained")
    figure.suptitle(TITLE, fontsize=12)
    parts = figure.subfigures(len(runs), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (shape, by_routing) in zip(parts, runs.items(), strict=True):
        _panels(part, dict(zip(SHAPE, shape, strict=True)), by_routing, max(map(len, runs.values())))
    return figure


def _panels(part: Any, case: Mapping[str, Any], by_routing: Mapping[str, Sequence[Row]], columns: int) -> None:
    """One shape: its routings side by side, on one scale."""
    kind = "cpu" if case["device"] == "cpu" else "wall"
    part.suptitle(_title(case, [row for rows in by_routing.values() for row in rows]), fontsize=9, x=0.01, ha="left")
    routings = [routing for routing in (*ROUTINGS, "skewed") if routing in by_routing]
    axes = part.subplots(1, columns, sharex=True, sharey=True, squeeze=False)[0]
    for axis in axes[len(routings) :]:
        axis.set_visible(False)
    for number, (axis, routing) in enumerate(zip(axes, routings, strict=False)):
        _bars(axis, by_routing[routing], kind)
        axis.set_title(f"{routing} routing", fontsize=9)
        axis.tick_params(axis="y", left=False, labelleft=number == 0)
    axes[0].margins(x=0.13)
    axes[0].invert_yaxis()


def _bars(axis: Any, rows: Sequence[Row], kind: str) -> None:
    """A bar for the medians of CPU time (of wall clock, on an accelerator), a dot for those of wall clock."""
    ratios, walls = (_ratios(rows, which) for which in (kind, "wall"))
    names = [f"{row['contestant']}{' (' + row['note'] + ')' if row['note'] else ''}" for row in rows]
    colours = [OURS, *(QUICKER if ratio < 1 else THEIRS for ratio in ratios[1:])]
    bars = axis.barh(names, ratios, height=0.72, color=colours)
    for bar, row in zip(bars, rows, strict=True):
        if row["note"]:
            bar.set(hatch="////", edgecolor="white")
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    axis.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=6, fontsize=8, bbox=box)
    if kind == "cpu":
        axis.plot(walls, names, ".", color=LINE, markersize=4)
    axis.axvline(1.0, color=LINE, linewidth=0.8, zorder=0)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _ratios(rows: Sequence[Row], kind: str) -> list[float]:
    medians = [statistics.median(row[kind]) for row in rows]
    return [median / medians[0] for median in medians]


def _title(case: Mapping[str, Any], rows: Sequence[Row]) -> str:
    loads, days = [row["load"] for row in rows], sorted({row["at"][:10] for row in rows})
    bars = "bars: CPU time of the busiest rank, dots: wall clock" if case["device"] == "cpu" else "bars: wall clock"
    return (
        f"{TIMED[case['timed']]}{case['dtype']}, {case['experts']} experts, k = {case['top_k']}, D = {case['dim']},"
        f" F = {case['expert_dim']}, {case['tokens']} tokens a rank, {case['ranks']} ranks x {case['threads']} threads"
        f"; malloc {case['allocator']}; {bars}, medians of {len(rows[0]['wall'])}\n"
        f"{case['machine']}, {case['cores']} cores, {case['device']}, torch {case['torch']}, products by"
        f" {case['gemm']}, load {min(loads):.1f} to {max(loads):.1f}, {', '.join(days)}"
    )
