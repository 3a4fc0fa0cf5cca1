"""The one report of a comparison: report.md to read, report.json to compute with; every figure from the runs' files."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moetrain.checks import traits_of
from moetrain.monitor.origin import SECRET
from moetrain.monitor.runfolder import read_record
from moetrain.survey.results import Numbers, Spread, numbers_of, spread, spreads
from moetrain.survey.runs import BalanceRule, Comparison, Contestant, Failure, notes_of

LIMITS = """\
- One model, one corpus, one budget, as said above. Which router is ahead here says nothing about another size, a longer
  run or other text.
- Few seeds: differences within the spread are not differences. Look at the column that compares seed by seed.
- Nothing was tuned for any router: learning rate, capacity and batch are the recipe's, also for methods that were
  published dropless (`moetrain routers` says which), and a router's own settings are those of its file. One that has
  many more experts per token at the start than it expects (ReMoE) drops much of them under a capacity limit.
- Under a capacity limit whose order of service is not `token_major`, later tokens can take the slots of earlier ones,
  in evaluation too, whatever the router: validation losses peek then, where evaluation drops anything.
- What adapts by itself (biases, thresholds, warm-ups) does so over thousands of steps; in a short run it hardly begins.
- Equal steps and tokens are not equal arithmetic: routers differ in their experts per token.
- Tokens/s are those of this implementation on this machine, and only if nothing else ran there."""


@dataclass(frozen=True)
class Entry:
    """A router in the report. numbers: by seed, of the runs that are done. behind: validation loss minus that of the
    router with the best mean, over the seeds that both have; None where they share none.
    """

    contestant: Contestant
    numbers: dict[int, Numbers]
    spreads: dict[str, Spread]
    behind: Spread | None


def entries_of(comparison: Comparison) -> list[Entry]:
    """Routers with at least one run that is done, the best mean validation loss first; after all others those
    that see later tokens.
    """
    numbers = {
        contestant.router: {
            run.seed: numbers_of(run.folder)
            for run in comparison.runs
            if run.router == contestant.router and run.is_done
        }
        for contestant in comparison.contestants
    }
    found = [
        Entry(contestant, numbers[contestant.router], spreads(list(numbers[contestant.router].values())), None)
        for contestant in comparison.contestants
        if numbers[contestant.router]
    ]
    found.sort(key=lambda entry: (_warning(entry.contestant), *_order(entry.spreads["validation_loss"])))
    return [dataclasses.replace(entry, behind=_behind(entry, found[0])) for entry in found]


def _order(loss: Spread) -> tuple[int, float]:
    """A router with a seed that trained to NaN comes after all whose seeds did not."""
    return loss.num_missing, math.inf if math.isnan(loss.mean) else loss.mean


def write_reports(
    comparison: Comparison, failures: Sequence[Failure], rule: BalanceRule, words: Sequence[str], out: Path
) -> Path:
    """Write report.json and report.md into ``out``; returns the latter. words: the command line."""
    command = shlex.join([SECRET.sub(r"\1***", word) for word in words])
    entries = entries_of(comparison)
    facts = _facts(comparison, rule, command)
    out.mkdir(parents=True, exist_ok=True)
    document = {**facts, "routers": [_json(entry) for entry in entries], "failed": [f.name for f in failures]}
    text = json.dumps(_no_nan(document), indent=2, allow_nan=False)
    (out / "report.json").write_text(text + "\n", encoding="utf-8")
    (out / "report.md").write_text(_markdown(comparison, entries, failures, facts), encoding="utf-8")
    return out / "report.md"


def _no_nan(value: Any) -> Any:
    """null for what is not finite: JSON has no word for it."""
    if isinstance(value, dict):
        return {key: _no_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_no_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _behind(entry: Entry, best: Entry) -> Spread | None:
    pairs = [(entry.numbers[seed], best.numbers[seed]) for seed in entry.numbers.keys() & best.numbers.keys()]
    return spread([ours.validation_loss - other.validation_loss for ours, other in pairs]) if pairs else None


def _facts(comparison: Comparison, rule: BalanceRule, command: str) -> dict[str, Any]:
    config = comparison.contestants[0].config
    starts = [read_record(run.folder.record) for run in comparison.runs if run.is_done]
    last = [record["starts"][-1] for record in starts if record is not None]
    sources = {(start["commit"], start["dirty"], json.dumps(start["versions"])) for start in last}
    return {
        "command": command,
        "recipe": config.recipe.name,
        "ranks": comparison.world,
        "steps": config.train.steps,
        "tokens": config.train.steps * config.train.global_batch * config.model.context,
        "num_experts": config.experts.num_experts,
        "corpus": config.data.source,
        "seeds": list(comparison.seeds),
        "balance": rule,
        "machine": _machine(),
        "sources": [{"commit": c, "dirty": d, "versions": json.loads(v)} for c, d, v in sorted(sources, key=str)],
    }


def _machine() -> str:
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no accelerator"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {device}"


def _json(entry: Entry) -> dict[str, Any]:
    about = entry.contestant.about
    return {
        "router": entry.contestant.router,
        "paper": None if about is None else about.paper,
        "balance": dataclasses.asdict(entry.contestant.config.balance),
        "traits": dataclasses.asdict(traits_of(entry.contestant.config)),
        "spreads": {name: dataclasses.asdict(value) for name, value in entry.spreads.items()},
        "behind_best": None if entry.behind is None else dataclasses.asdict(entry.behind),
        "runs": {str(seed): dataclasses.asdict(numbers) for seed, numbers in sorted(entry.numbers.items())},
    }


def _markdown(
    comparison: Comparison, entries: Sequence[Entry], failures: Sequence[Failure], facts: dict[str, Any]
) -> str:
    parts = [
        f"# Routers compared on the recipe `{facts['recipe']}`",
        "Written by the command below from the metrics of its runs; `report.json` has every run by itself.",
        f"```bash\n{facts['command']}\n```",
        _setting(comparison, facts),
        "## Loss\n\n" + _loss_table(entries, facts["balance"]),
        "## Balance and speed\n\n" + _balance_table(entries),
        *([] if not (lines := _without_numbers(entries)) else ["## Without a number\n\n" + "\n".join(lines)]),
        *([] if not failures else ["## Failed\n\n" + "\n\n".join(_failed(failure) for failure in failures)]),
        "## What this does not show\n\n" + LIMITS,
        "## Where it ran\n\n" + _origin(facts),
    ]
    return "\n\n".join(parts) + "\n"


def _setting(comparison: Comparison, facts: dict[str, Any]) -> str:
    seeds = ", ".join(map(str, comparison.seeds))
    balance = {
        "published": "Each router is trained with the option of conf/balance that its `_about_` names.",
        "same": "All routers are trained with the recipe's balance section.",
    }[facts["balance"]]
    return (
        f"Each router is trained for {facts['steps']} steps, {facts['tokens']:,} tokens of {facts['corpus']}, with"
        f" {facts['num_experts']} experts a layer on {facts['ranks']} rank(s), from seed(s) {seeds}. A seed sets the"
        " order of the data and the initial weights: under one seed all routers see the same batches, and all"
        f" that is not router starts alike. {balance}"
        " Numbers are means over seeds, with the lowest and the highest in brackets."
        + "".join(f"\n\n{note}" for note in notes_of(comparison))
    )


def _loss_table(entries: Sequence[Entry], rule: BalanceRule) -> str:
    head = ["router", "balance", "seeds", "validation loss, nats/token", "behind the first, seed by seed", "train loss"]
    rows = []
    for entry in entries:
        name = f"`{entry.contestant.router}`" + _warning(entry.contestant)
        about = entry.contestant.about
        balance = about.balance if about is not None and rule == "published" else "the recipe's"
        behind = "-" if entry.behind is None or entry is entries[0] else _text(entry.behind, "+.4f")
        losses = [_text(entry.spreads[key], ".4f") for key in ("validation_loss", "train_loss")]
        rows.append([name, balance, str(len(entry.numbers)), losses[0], behind, losses[1]])
    note = "\n\n\\* sees later tokens: its losses can't be compared with those of the others."
    return _table(head, rows) + (note if any(_warning(entry.contestant) for entry in entries) else "")


def _balance_table(entries: Sequence[Entry]) -> str:
    head = ["router", "MaxVio", "MaxVio, worst layer", "dropped", "dead experts", "experts per token", "tokens/s"]
    columns = [
        ("max_vio", ".2f"),
        ("worst_vio", ".2f"),
        ("drop_fraction", ".1%"),
        ("dead_experts", ".1f"),
        ("experts_per_token", ".2f"),
        ("tokens_per_second", ",.0f"),
    ]
    rows = [
        [f"`{entry.contestant.router}`", *(_text(entry.spreads[name], form) for name, form in columns)]
        for entry in entries
    ]
    note = (
        "MaxVio is max_e c_e / mean(c) - 1 with c the assignments of a window before dropping (0 is even), mean over"
        " layers; dead experts had no token in a window, sum over layers. All but tokens/s are means over the windows"
        " of the second half of training; tokens/s is the median window without the first."
    )
    return f"{_table(head, rows)}\n\n{note}"


def _warning(contestant: Contestant) -> str:
    traits = traits_of(contestant.config)
    return "" if traits.causal_train and traits.causal_eval else " \\*"


def _text(value: Spread, form: str) -> str:
    if math.isnan(value.mean):
        return "no number"
    mean = format(value.mean, form)
    text = mean if value.std is None else f"{mean} ({format(value.low, form)} .. {format(value.high, form)})"
    return text + (f", {value.num_missing} seed(s) without" if value.num_missing else "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _without_numbers(entries: Sequence[Entry]) -> list[str]:
    """One line for each run that trained to NaN, or had windows in which a layer got nothing to do."""
    lines = []
    for entry in entries:
        for seed, numbers in sorted(entry.numbers.items()):
            losses = {"validation": numbers.validation_loss, "train": numbers.train_loss}
            words = [f"its {name} loss is {loss}" for name, loss in losses.items() if not math.isfinite(loss)]
            if numbers.no_load:
                words.append(f"no load on some layer in {numbers.no_load} of {numbers.num_windows} windows")
            if numbers.num_windows == 0:
                words.append("no window in the second half of training: monitor.log_every is too large")
            lines += [f"- `{entry.contestant.router}`, seed {seed}: {'; '.join(words)}."] if words else []
    return lines


def _failed(failure: Failure) -> str:
    tail = "\n".join(failure.tail)
    return f"`{failure.name}`, log in `{failure.log}`:\n\n```\n{tail}\n```"


def _origin(facts: dict[str, Any]) -> str:
    lines = [f"- {facts['machine']}"]
    for source in facts["sources"]:
        state = " with uncommitted changes" if source["dirty"] else ""
        commit = "an installed package" if source["commit"] is None else f"commit {source['commit']}{state}"
        versions = ", ".join(f"{name} {version}" for name, version in source["versions"].items())
        lines.append(f"- {commit}; {versions}")
    return "\n".join(lines)
