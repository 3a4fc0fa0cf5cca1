"""One folder for all ranks of a run, and what it says about where the run came from.

::

    outputs/<id>/config.yaml     the resolved config          metrics.jsonl      all numbers
                 run.json        config hash, every start     expert_load.jsonl  exact counts, of some windows
                 start-N.diff    uncommitted source, start N  events.jsonl       what happened
                 logs/rankN.log  one a rank                   report.txt         the closing report
                 checkpoints/        requeue: it was left, saved

The id: ``run.id``, else SLURM_JOB_ID (a requeued job keeps it), else the ``--rdzv-id`` that the user gave to torchrun,
else a time stamp. ``torchrun --standalone`` makes up a random id: such a run gets a time stamp too, and finds its
folder again by that id when torchrun restarts it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from moetrain.config import Config
from moetrain.monitor.origin import Origin
from moetrain.redaction import Redacted
from moetrain.types import ConfigError, Problem

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# What may differ when a run is resumed, because it can not have changed the weights that the run has reached.
# ``train.steps`` is not here: the learning rate of every step depends on it.
FREE = (
    "monitor.",
    "health.",
    "machine.",
    "recipe.",
    "run.id",
    "run.root",
    "run.resume",
    "run.on_config_change",
    "run.elastic",
    "data.cache",
    "engine.name",
    "engine.zero_stage",
    "engine.ep_size",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.keep_best",
    "train.async_checkpoint",
    "train.sample_tokens",
)


@dataclass(frozen=True)
class RunFolder:
    """Where a run lives; the same on every rank."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def record(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def expert_load(self) -> Path:
        return self.path / "expert_load.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.txt"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def rollbacks(self) -> Path:
        return self.path / "rollbacks.json"

    @property
    def requeue(self) -> Path:
        return self.path / "requeue"

    def log(self, rank: int) -> Path:
        return self.path / "logs" / f"rank{rank}.log"


def open_run_folder(
    config: Config, config_text: str, rank: int, broadcast: Callable[[str], str], origin: Origin
) -> RunFolder:
    """Rank 0 chooses or finds the folder and writes it; every rank gets the same answer. Collective.

    config_text: the resolved config as YAML. broadcast: gives rank 0's text to every rank.
    Raises ConfigError, on every rank alike, if the id is no file name, if the folder holds a run of another config
    (naming the keys) and ``run.on_config_change`` is not ``allow``, or if it holds a run and ``run.resume`` is
    ``never``.
    """
    answer: dict[str, Any] = {}
    if rank == 0:
        try:
            answer["name"] = _prepare(config, config_text, origin)
        except ConfigError as error:
            answer["problems"] = [[p.field, p.value, p.reason, p.fix] for p in error.problems]
        except (OSError, ValueError) as error:  # the other ranks wait for an answer, whatever happens here
            fix = "choose a folder that can be written, e.g. run.root=outputs run.id=first-try"
            answer["problems"] = [["run.root", config.run.root, f"{type(error).__name__}: {error}", fix]]
    answer = json.loads(broadcast(json.dumps(answer, default=str)))
    if "problems" in answer:
        raise ConfigError([Problem(*problem) for problem in answer["problems"]])
    folder = RunFolder(Path(config.run.root) / answer["name"])
    folder.log(rank).parent.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def rank_log(folder: RunFolder, rank: int) -> Iterator[None]:
    """Everything that is logged in this process from level INFO on goes to this rank's file, appended."""
    handler = logging.FileHandler(folder.log(rank), encoding="utf-8")
    handler.setFormatter(Redacted(f"%(asctime)s [rank {rank}] %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(min(level, logging.INFO))
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()


def config_hash(config: Config) -> str:
    """Of everything that must stay the same on resume; the same on every rank and every machine."""
    return hashlib.sha256(json.dumps(_bound(flat(config)), sort_keys=True).encode()).hexdigest()[:16]


def flat(config: Config) -> dict[str, object]:
    """Dotted keys and plain values, as the user writes them: {"train.steps": 100, ...}."""
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    out: dict[str, object] = {}
    todo = [("", plain)]
    while todo:
        prefix, value = todo.pop()
        if isinstance(value, dict):
            todo += [(f"{prefix}.{key}" if prefix else str(key), inner) for key, inner in value.items()]
        else:
            out[prefix] = value
    return dict(sorted(out.items()))


def known_id(config: Config, origin: Origin) -> str | None:
    """The id that somebody chose, or that an earlier start under the same torchrun made. Raises ConfigError."""
    return _name(config) or _restarted(Path(config.run.root), origin)


def _prepare(config: Config, config_text: str, origin: Origin) -> str:
    """What only rank 0 does. Returns the name of the folder, which then exists and agrees with the config."""
    root = Path(config.run.root)
    name = known_id(config, origin) or _fresh(root)
    folder = RunFolder(root / name)
    folder.path.mkdir(parents=True, exist_ok=True)
    starts: list[dict[str, Any]] = []
    if folder.record.exists():
        old = read_record(folder.record)
        if old is None:
            fix = "choose another run.id, or delete that file if the run is to go on all the same"
            raise ConfigError([Problem("run.id", name, f"{folder.record} is damaged, so its config is not known", fix)])
        _agree(folder, config, old["config"])
        starts = old["starts"]
    number = len(starts) + 1
    if origin.diff:
        (folder.path / f"start-{number}.diff").write_text(origin.diff)
    record = {
        "id": name,
        "config_hash": config_hash(config),
        "config": flat(config),
        "starts": [*starts, {"start": number, "time": _now().isoformat(), **origin.facts()}],
    }
    folder.requeue.unlink(missing_ok=True)
    _write(folder.config, config_text)
    _write(folder.record, json.dumps(record, indent=2) + "\n")
    return name


def _name(config: Config) -> str | None:
    """The id that somebody chose, checked; None: nobody did."""
    rendezvous = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    chosen = {
        "run.id": config.run.id,
        "SLURM_JOB_ID": os.environ.get("SLURM_JOB_ID"),
        "TORCHELASTIC_RUN_ID": None if rendezvous == "none" or _is_random(rendezvous) else rendezvous,
    }
    for source, value in chosen.items():
        if value is None:
            continue
        if NAME.fullmatch(value) is None:
            reason = "it names the run folder, so it must be a plain file name"
            fix = "use letters, digits, '.', '_' and '-', at most 128, e.g. run.id=first-try"
            raise ConfigError([Problem(source, value, reason, fix)])
        return value
    return None


def _is_random(text: str) -> bool:
    try:
        uuid.UUID(text)
    except ValueError:
        return False
    return True


def _restarted(root: Path, origin: Origin) -> str | None:
    """The folder which an earlier start under the same torchrun made."""
    if origin.launch_id is None:
        return None
    for record in root.glob("*/run.json"):
        found = read_record(record)
        if found is not None and any(start.get("launch_id") == origin.launch_id for start in found["starts"]):
            return record.parent.name
    return None


def _fresh(root: Path) -> str:
    """A name from the time, made unique by making the folder."""
    stamp = _now().strftime("%Y-%m-%d_%H-%M-%S")
    number = 1
    while True:
        name = stamp if number == 1 else f"{stamp}_{number}"
        try:
            (root / name).mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return name


def _agree(folder: RunFolder, config: Config, old: Mapping[str, object]) -> None:
    if config.run.resume == "never":
        fix = "choose another run.id, or continue it with run.resume=auto"
        raise ConfigError([Problem("run.resume", "never", f"{folder.path} already holds a run", fix)])
    if config.run.on_config_change == "allow":
        return
    before, after = _bound(old), _bound(flat(config))
    changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    fix = "put it back, choose another run.id, or say run.on_config_change=allow"
    where = f"the run in {folder.path} was started with"
    if changed:
        raise ConfigError([Problem(key, after.get(key), f"{where} {before.get(key)!r}", fix) for key in changed])


def _bound(flat: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in flat.items() if not key.startswith(FREE)}


def read_record(record: Path) -> dict[str, Any] | None:
    """A run.json, or None if it is damaged or not one of ours."""
    try:
        found = json.loads(record.read_text())
    except (ValueError, RecursionError):
        return None
    whole = isinstance(found, dict) and isinstance(found.get("config"), dict) and isinstance(found.get("starts"), list)
    return found if whole and all(isinstance(start, dict) for start in found["starts"]) else None


def _write(path: Path, text: str) -> None:
    """All or nothing, so that a start that is killed leaves the former file."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text)
    fresh.replace(path)


def _now() -> datetime:
    return datetime.now().astimezone()
