"""Commands for watching runs. They read what a run has left or is still writing in its folder, and never touch it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from moetrain.checkpoint.manifest import MANIFEST
from moetrain.config import MonitorConfig, RunConfig
from moetrain.monitor.runfolder import RunFolder
from moetrain.problems import nearest
from moetrain.types import ConfigError, Problem

NUM_NAMED = 5
RUN_HELP = "the folder of a run, or the id of one below outputs/"


class PlainParser(argparse.ArgumentParser):
    """A few options and no overrides; a mistake is a ConfigError like any other."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(f"moetrain {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError([Problem("command line", self.prog, message, f"see {self.prog} --help")])


class RunParser(PlainParser):
    """RUN comes first."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(command, description)
        self.add_argument("run", metavar="RUN", help=RUN_HELP)


def run_folder(given: str, field: str = "RUN") -> Path:
    """The run folder that ``given`` names: its path, or its id below outputs/. Raises ConfigError."""
    root = Path(RunConfig().root)
    for path in (Path(given), root / given):
        if RunFolder(path).record.is_file():
            return path
    records = sorted(root.glob("*/run.json"), key=lambda record: -record.stat().st_mtime)
    runs = [record.parent.name for record in records]
    fix = f"give the folder of a run, e.g. {root}/first-try"
    if (near := nearest(given, runs)) is not None:
        fix = f"give {near}"
    elif runs:
        fix = f"give a folder, or one of the newest runs in {root}: {', '.join(runs[:NUM_NAMED])}"
    reason = f"is neither the folder of a run nor the id of one in {root}: there is no run.json"
    raise ConfigError([Problem(field, given, reason, fix)])


def inspect(arguments: list[str]) -> int:
    from moetrain.inspect.command import Asked
    from moetrain.inspect.command import inspect as look

    parsed = _inspect_parser().parse_args(arguments)
    asked = Asked(
        path=None if parsed.run is None else _checkpoint(parsed.run),
        text=parsed.text,
        corpus=parsed.corpus,
        walk=parsed.walk,
        num_batches=parsed.batches,
        layers=tuple(parsed.layer),
        train_capacity=parsed.capacity == "train",
        html=parsed.html,
        json=parsed.json,
    )
    from rich.console import Console

    return look(asked, Console())


def _inspect_parser() -> PlainParser:
    about = "Show where tokens go in a trained model. The walk alone needs no run: it then shows a made-up layer."
    parser = PlainParser("inspect", about)
    add = parser.add_argument
    add("run", metavar="RUN", nargs="?", help=f"{RUN_HELP}, or one checkpoint, checkpoints/step_* in that folder")
    add("--text", metavar="TEXT", help="the experts that each token of TEXT chooses, with weights, slots and drops")
    add("--corpus", action="store_true", help="what each expert specialises in, over validation data of the run")
    add("--walk", action="store_true", help="the routing of a few tokens step by step, from logits to what comes back")
    add("--batches", type=int, default=8, metavar="N", help="micro-batches for --corpus (default: 8)")
    add("--layer", type=int, action="append", default=[], metavar="N", help="only this layer; may be given again")
    add("--capacity", choices=("eval", "train"), default="eval", help="whose slots an expert has (default: eval)")
    add("--html", type=Path, metavar="FILE", help="write it as one HTML file instead")
    add("--json", action="store_true", help="print it as JSON instead")
    return parser


def _checkpoint(given: str) -> Path:
    """A checkpoint's own folder, or that of a run. Raises ConfigError."""
    return Path(given) if (Path(given) / MANIFEST).is_file() else run_folder(given)


def doctor(arguments: list[str]) -> int:
    parser = RunParser(
        "doctor", "Say what is or was wrong with the routers of a run, by which numbers, and what to do."
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if something is still wrong at the end")
    parsed = parser.parse_args(arguments)
    run = run_folder(parsed.run)
    from moetrain.monitor.history import read_history
    from moetrain.monitor.rounds import examine, findings_json, findings_text, num_heard

    history = read_history(run)
    found = examine(history)
    print((findings_json if parsed.json else findings_text)(history, found, num_heard(history)))
    return int(parsed.strict and any(one.at_end for one in found))


def report(arguments: list[str]) -> int:
    parser = RunParser("report", "Write a run, or two beside each other, as one HTML file that needs nothing else.")
    text = "where to write it (default: report.html in the folder of the run)"
    parser.add_argument("--out", type=Path, metavar="FILE", help=text)
    parser.add_argument("--compare", metavar="RUN2", help="a second run, to be shown beside the first")
    parsed = parser.parse_args(arguments)
    run = run_folder(parsed.run)
    compare = None if parsed.compare is None else run_folder(parsed.compare, "--compare")
    from moetrain.monitor.html import report as write

    print(f"report in {write(run, parsed.out, compare)}")
    return 0


def top(arguments: list[str]) -> int:
    parser = RunParser("top", "Show the newest expert load of a run in the terminal until it is over, or Ctrl-C.")
    parser.add_argument("--once", action="store_true", help="show it once and leave, as where there is no terminal")
    parsed = parser.parse_args(arguments)
    run = run_folder(parsed.run)
    from rich.console import Console

    from moetrain.monitor.top import top as watch

    return watch(run, parsed.once, Console())


def wandb_setup(arguments: list[str]) -> int:
    about = 'Publish the view "MoE balance" in a wandb project, which needs an account and its key; --dump needs none.'
    parser = PlainParser("wandb-setup", about)
    parser.add_argument("--entity", required=True, metavar="NAME", help="the user or team that the project belongs to")
    project = MonitorConfig().wandb_project
    parser.add_argument("--project", default=project, metavar="NAME", help=f"the project (default: {project})")
    parser.add_argument("--dump", type=Path, metavar="FILE", help="write the view to a file instead, as JSON")
    parsed = parser.parse_args(arguments)
    from moetrain.monitor.wandb_view import publish_view, write_view

    if parsed.dump is None:
        print(publish_view(parsed.entity, parsed.project))
    else:
        write_view(parsed.entity, parsed.project, parsed.dump)
        print(f"view in {parsed.dump}")
    return 0


COMMANDS: Mapping[str, Callable[[list[str]], int]] = {
    "doctor": doctor,
    "inspect": inspect,
    "report": report,
    "top": top,
    "wandb-setup": wandb_setup,
}
