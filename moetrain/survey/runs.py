"""The runs of a comparison: planned and checked before the first one starts, then done one after the other."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moetrain.arguments import environment_world
from moetrain.checks import world_of
from moetrain.compose import ROUTER, about_problems, compose, option_values, options, quoted
from moetrain.config import AboutPart, Config
from moetrain.monitor.runfolder import RunFolder, config_hash, read_record
from moetrain.problems import nearest, unknown_option
from moetrain.survey.catalogue import about_of, settings_of
from moetrain.survey.results import rows_of
from moetrain.types import ConfigError, Problem

TAIL = 15
TORCHRUN = "failed (exitcode:"
OURS = ("run.id", "run.root")
BalanceRule = Literal["published", "same"]


@dataclass(frozen=True)
class Asked:
    """What the user typed. balance: each router's own option, as published, or the recipe's for all."""

    overrides: tuple[str, ...]
    config_dir: str | None
    out: Path
    world: int | None
    num_seeds: int
    balance: BalanceRule


@dataclass(frozen=True)
class Run:
    """One training run. overrides: what ``moetrain train`` is given."""

    router: str
    seed: int
    config: Config
    overrides: tuple[str, ...]
    folder: RunFolder

    @property
    def name(self) -> str:
        return self.folder.id

    @property
    def log(self) -> Path:
        return self.folder.path.with_name(f"{self.name}.log")

    @property
    def is_done(self) -> bool:
        rows = rows_of(self.folder)
        return bool(rows) and rows[-1]["train/step"] == self.config.train.steps and "validation/lm_loss" in rows[-1]


@dataclass(frozen=True)
class Contestant:
    """A router and what it is trained with. about: None where its file has none, under ``--balance same``."""

    router: str
    about: AboutPart | None
    config: Config
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """All runs, seed by seed, so that one that is cut short compares as many routers as it can."""

    contestants: tuple[Contestant, ...]
    seeds: tuple[int, ...]
    world: int
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Failure:
    """A run that did not come to its end, and what it said last."""

    name: str
    log: Path
    tail: tuple[str, ...]


Launch = Callable[[Run], int]


def plan_comparison(asked: Asked) -> Comparison:
    """Everything that can be found wrong is found here. Raises ConfigError with all problems."""
    names, shared = _names(asked.overrides)
    contestants, problems = _contestants(names, shared, asked)
    problems = _words(shared, asked) + problems
    if problems:
        raise ConfigError(problems)
    first = contestants[0].config
    seeds = tuple(range(first.run.seed, first.run.seed + asked.num_seeds))
    world = world_of(first, asked.world)
    runs = tuple(_run(contestant, seed, asked.out) for seed in seeds for contestant in contestants)
    problems = [problem for run in runs for problem in _folder_problems(run, world)]
    if problems:
        raise ConfigError(problems)
    return Comparison(tuple(contestants), seeds, world, runs)


def carry_out(comparison: Comparison, launch: Launch, say: Callable[[str], None]) -> list[Failure]:
    """Do what is not done yet. A run that fails stops no other one."""
    failures: list[Failure] = []
    for number, run in enumerate(comparison.runs, start=1):
        place = f"[{number}/{len(comparison.runs)}] {run.name}"
        if run.is_done:
            say(f"{place}: done before")
            continue
        say(f"{place}: running, log in {run.log}")
        status = launch(run)
        if status != 0 or not run.is_done:
            failures.append(Failure(run.name, run.log, _tail(run.log)))
            say(f"{place}: FAILED with exit code {status}")
        else:
            say(f"{place}: validation loss {rows_of(run.folder)[-1]['validation/lm_loss']:.4f}")
    return failures


def launcher(world: int, config_dir: str | None) -> Launch:
    """Starts a run as a user would; what it prints goes to its log."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    options_folder = [] if config_dir is None else ["--config-dir", config_dir]

    def launch(run: Run) -> int:
        run.log.parent.mkdir(parents=True, exist_ok=True)
        command = [*torchrun, "-m", "moetrain", "train", *run.overrides, *options_folder]
        with run.log.open("w", encoding="utf-8") as log:
            return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode

    return launch


def _names(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The routers of ``router=a,b,c``, which Hydra's grammar would take for a sweep, and all other overrides."""
    chosen = [text for text in overrides if text.startswith(f"{ROUTER}=")]
    values = [text.partition("=")[2] for text in chosen]
    names = [name.strip() for name in values[0].split(",")] if values else []
    twice = sorted({name for name in names if names.count(name) > 1})
    example = f"{ROUTER}=mixtral,switch, say, with routers of `moetrain routers`"
    if not chosen:
        raise ConfigError([_no_names(overrides, f"add {example}")])
    if len(chosen) > 1:
        reason, fix = f"{ROUTER}= is there {len(chosen)} times", f"write it once: {ROUTER}={','.join(values)}"
    elif any(sign in values[0] for sign in "[]"):
        reason, fix = "the routers are not written as a list", f"write {ROUTER}={values[0].strip('[]')}"
    elif not all(names):
        kept = ",".join(filter(None, names))
        reason, fix = "there is no name between two commas or at an end", f"write {ROUTER}={kept or 'mixtral,switch'}"
    elif twice:
        reason, fix = f"{', '.join(twice)} is there more than once", f"write {ROUTER}={','.join(dict.fromkeys(names))}"
    elif len(names) < 2:
        reason, fix = "a comparison needs at least two different routers", f"write {example}"
    else:
        return names, [text for text in overrides if text not in chosen]
    raise ConfigError([Problem(ROUTER, " ".join([values[0], *chosen[1:]]), reason, fix)])


def _no_names(overrides: Sequence[str], fix: str) -> Problem:
    """Nothing was named, or under a misspelt key."""
    for key, equals, value in [text.partition("=") for text in overrides]:
        if equals and key not in Config.__dataclass_fields__ and nearest(key, [ROUTER]):
            return Problem(key, value, f"there is no section {key!r}; nearest is {ROUTER}", f"write {ROUTER}={value}")
    return Problem(ROUTER, None, "a comparison needs at least two different routers", fix)


def notes_of(comparison: Comparison) -> list[str]:
    """Which contestants are the same router by class and settings, so that their runs can differ by little."""
    found: dict[str, list[Contestant]] = {}
    for contestant in comparison.contestants:
        settings = settings_of(contestant.config.router, contestant.config.machine.allow_modules)
        found.setdefault(repr(settings), []).append(contestant)
    notes = []
    for same in [several for several in found.values() if len(several) > 1]:
        alike = all(contestant.config.balance == same[0].config.balance for contestant in same)
        what = "balance is the same too, so are their runs" if alike else "their runs differ in balance only"
        names = " and ".join(contestant.router for contestant in same)
        notes.append(f"Note: {names} are one class with the same settings; {what}.")
    return notes


def _contestants(names: Sequence[str], shared: Sequence[str], asked: Asked) -> tuple[list[Contestant], list[Problem]]:
    known = options(ROUTER, asked.config_dir)
    contestants: list[Contestant] = []
    problems = [unknown_option(ROUTER, name, known) for name in names if name not in known]
    found: dict[str, tuple[Problem, list[str]]] = {}  # by its words: a value need not be hashable
    composed = [name for name in names if name in known]
    values = option_values(ROUTER, composed, asked.config_dir)
    for name in composed:
        about = about_of(values[name])
        if about is None and asked.balance == "published":
            fix = "add `_about_: {paper: ..., balance: ...}` to it, or compare with --balance same"
            problems.append(Problem(ROUTER, name, "its file does not say what it was published with", fix))
            continue
        if wrong := about_problems(ROUTER, values[name], asked.config_dir):
            problems += wrong
            continue
        balance = [f"balance={about.balance}"] if about is not None and asked.balance == "published" else []
        overrides = (*shared, f"{ROUTER}={name}", *balance)
        try:
            contestants.append(Contestant(name, about, compose(overrides, asked.world, asked.config_dir), overrides))
        except ConfigError as error:
            for problem in error.problems:
                found.setdefault(str(problem), (problem, []))[1].append(name)
    return contestants, problems + [_whose(problem, who, len(composed)) for problem, who in found.values()]


def _whose(problem: Problem, routers: Sequence[str], num_routers: int) -> Problem:
    """A problem of all routers is told once, as it is; any other one names those that have it."""
    if len(routers) == num_routers:
        return problem
    return dataclasses.replace(problem, reason=f"{problem.reason} (with {ROUTER}={','.join(routers)})")


def _words(shared: Sequence[str], asked: Asked) -> list[Problem]:
    """Overrides that a comparison sets by itself, and numbers that can not be."""
    problems = []
    for key, _, value in [text.partition("=") for text in shared]:
        if key in OURS:
            problems.append(Problem(key, value, "a comparison names its runs itself", "leave it out, and use --out"))
        if key.partition(".")[0] == "balance" and asked.balance == "published":
            fix = "leave it out, or say --balance same"
            problems.append(Problem(key, value, "each router is trained with the balance it was published with", fix))
    if asked.num_seeds < 1:
        problems.append(Problem("--seeds", asked.num_seeds, "must be at least 1", "set --seeds 3, say"))
    if environment_world() is not None:
        fix = "start it without torchrun, and say --world N"
        problems.append(Problem("WORLD_SIZE", environment_world(), "compare starts its runs with torchrun itself", fix))
    return problems


def _run(contestant: Contestant, seed: int, out: Path) -> Run:
    name = f"{contestant.router}-seed{seed}"
    settings = dataclasses.replace(contestant.config.run, id=name, root=str(out), seed=seed)
    overrides = (*contestant.overrides, f"run.id={name}", f"run.root={quoted(str(out))}", f"run.seed={seed}")
    config = dataclasses.replace(contestant.config, run=settings)
    return Run(contestant.router, seed, config, overrides, RunFolder(out / name))


def _folder_problems(run: Run, world: int) -> list[Problem]:
    """A folder that is there already must hold this very run, done or not."""
    if not run.folder.record.exists():
        return []
    fix = f"name another folder with --out, or delete {run.folder.path}"
    record = read_record(run.folder.record)
    if record is None:
        return [Problem("--out", run.name, f"{run.folder.record} is damaged", fix)]
    if record["config_hash"] != config_hash(run.config):
        return [Problem("--out", run.name, f"{run.folder.path} holds a run of another configuration", fix)]
    if (before := record["starts"][-1]["world_size"]) != world:
        return [Problem("--world", world, f"{run.folder.path} was started on {before}", fix)]
    try:
        rows_of(run.folder)
    except ValueError as error:
        return [Problem("--out", run.name, str(error), fix)]
    return []


def _tail(log: Path) -> tuple[str, ...]:
    """The last lines that the run itself wrote: torchrun's account of it comes after."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    end = next((number for number, line in enumerate(lines) if TORCHRUN in line), len(lines))
    return tuple([line for line in lines[:end] if line.strip()][-TAIL:])
