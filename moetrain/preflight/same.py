"""Whether all ranks run the same program, on the same configuration, the same data, at the same time."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from moetrain.config import Config
from moetrain.data import Corpus
from moetrain.monitor.origin import Origin
from moetrain.monitor.runfolder import flat
from moetrain.parallel.collectives import barrier, broadcast_text
from moetrain.parallel.mesh import Mesh
from moetrain.preflight.findings import Finding, ask, by_value, judged, ranks

PACKAGE = Path(__file__).resolve().parents[1]
MAX_SKEW_S = 1.0
"""Below it, times in logs and of files can still be put in order."""


@dataclass(frozen=True)
class Program:
    """source: a hash of moetrain's own Python files. commit: of the checkout, "" if it is none."""

    python: str
    torch: str
    deepspeed: str
    moetrain: str
    commit: str
    source: str


@dataclass(frozen=True)
class Settings:
    """differs: keys whose values are not those of rank 0, with this rank's value."""

    differs: dict[str, object]


@dataclass(frozen=True)
class Data:
    fingerprint: str
    num_train_tokens: int
    num_validation_tokens: int
    vocab_size: int


@dataclass(frozen=True)
class Clock:
    seconds: float


def program(origin: Origin) -> Program:
    of = origin.versions
    return Program(
        of["python"], of["torch"], of["deepspeed"], of["moetrain"], origin.commit or "", source_hash(PACKAGE)
    )


def source_hash(package: Path) -> str:
    """Of names and contents of all Python files below ``package``."""
    content = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        content.update(f"{file.relative_to(package)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return content.hexdigest()[:16]


def judge_programs(programs: Sequence[Program]) -> Finding:
    rows = [asdict(one) for one in programs]
    unequal = {name: [str(row[name]) for row in rows] for name in rows[0] if len({row[name] for row in rows}) > 1}
    if unequal:
        said = "; ".join(f"{name}: {by_value([value or 'none' for value in of])}" for name, of in unequal.items())
        fix = "install the same versions and the same source on every host"
        return Finding("versions", False, f"ranks differ: {said}", fix, ", ".join(unequal))
    first = programs[0]
    named = f"python {first.python}, torch {first.torch}, deepspeed {first.deepspeed}, source {first.source}"
    return Finding("versions", True, f"{named}{f', commit {first.commit[:12]}' if first.commit else ''}")


def settings(mine: dict[str, object], of_rank_0: dict[str, object]) -> Settings:
    keys = [key for key in sorted(mine.keys() | of_rank_0.keys()) if mine.get(key) != of_rank_0.get(key)]
    return Settings({key: mine.get(key) for key in keys})


def judge_settings(all_settings: Sequence[Settings]) -> Finding:
    odd = {rank: one.differs for rank, one in enumerate(all_settings) if one.differs}
    if not odd:
        return Finding("configuration", True, "the same on every rank")
    keys = sorted({key for differs in odd.values() for key in differs})
    rank, first = next(iter(odd.items()))
    example = ", ".join(f"{key} = {value!r}" for key, value in list(first.items())[:4])
    reason = f"{ranks(odd)} were started with other values than rank 0 (rank {rank}: {example})"
    return Finding("configuration", False, reason, "give every host the same words", ", ".join(keys[:8]))


def judge_data(corpora: Sequence[Data]) -> Finding:
    if len(set(corpora)) > 1:
        said = by_value([f"{one.fingerprint[:12]} of {one.num_train_tokens:,} tokens" for one in corpora])
        fix = "give every host the same files; delete what it has prepared in data.cache of others"
        return Finding("data", False, f"ranks read different corpora: {said}", fix, corpora[0].fingerprint[:12])
    one = corpora[0]
    return Finding("data", True, f"{one.num_train_tokens:,} train tokens, fingerprint {one.fingerprint[:12]}")


def judge_clocks(clocks: Sequence[Clock]) -> Finding:
    times = [clock.seconds for clock in clocks]
    spread, early, late = max(times) - min(times), times.index(min(times)), times.index(max(times))
    if spread <= MAX_SKEW_S:
        return Finding("clocks", True, f"within {spread:.2f} s of each other", fatal=False)
    reason = f"the clock of rank {late} is {spread:.1f} s ahead of that of rank {early}: logs can not be compared"
    return Finding("clocks", False, reason, "synchronise the hosts' clocks (chrony, ntpd)", round(spread, 1), False)


def check_same(config: Config, origin: Origin, corpus: Corpus, mesh: Mesh) -> list[Finding]:
    """Versions, configuration and data. Collective."""
    found = [judged("versions", lambda: program(origin), Program, judge_programs, mesh)]
    found.append(_check_settings(config, mesh))
    found.append(judged("data", lambda: _data(corpus), Data, judge_data, mesh))
    return found


def check_clocks(mesh: Mesh) -> Finding:
    """Collective; all look at their clocks as they leave a barrier."""
    barrier(mesh.world_group)
    return judged("clocks", lambda: Clock(time.time()), Clock, judge_clocks, mesh)


def _check_settings(config: Config, mesh: Mesh) -> Finding:
    mine = flat(config)
    of_rank_0 = json.loads(broadcast_text(json.dumps(mine), mesh.world_group))
    return judge_settings(ask(lambda: settings(mine, of_rank_0), Settings, mesh))


def _data(corpus: Corpus) -> Data:
    meta = corpus.meta
    return Data(corpus.fingerprint, meta.num_train_tokens, meta.num_validation_tokens, meta.vocab_size)
