"""Each check of preflight finds its planted fault, on every rank alike, and nothing where nothing is wrong."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from moetrain.config import Config, DataConfig
from moetrain.data import Corpus, prepare
from moetrain.monitor.origin import Origin, origin
from moetrain.parallel.mesh import mesh_of_world
from moetrain.preflight import Finding, examine, exchange, memory, refuse, same, storage, warnings
from moetrain.types import ConfigError
from tests.ranks import run_ranks
from tests.saved import CPU
from tests.tiny import tiny

WORLD = 4
GROUPS = ("world group", "EP group", "expert-DP group")
OWN = 1  # the rank that the fault is planted on


@dataclass
class Case:
    """What one rank hands to ``examine``, to be spoilt."""

    rank: int
    folder: Path
    config: Config
    corpus: Corpus
    origin: Origin
    stack: ExitStack

    def patch(self, where: Any, name: str, value: Any) -> None:
        self.stack.enter_context(patch.object(where, name, value))


def nothing(case: Case) -> None:
    """All is well."""


def version(case: Case) -> None:
    if case.rank == OWN:
        case.origin = replace(case.origin, versions=case.origin.versions | {"torch": "2.11.0"})


def source(case: Case) -> None:
    if case.rank == OWN:
        case.patch(same, "source_hash", lambda package: "another")


def setting(case: Case) -> None:
    if case.rank == OWN:
        case.config = replace(case.config, optim=replace(case.config.optim, lr=0.3))


def data(case: Case) -> None:
    if case.rank == OWN:
        case.corpus = replace(case.corpus, meta=replace(case.corpus.meta, fingerprint="f" * 64))


def private_folder(case: Case) -> None:
    """A relative run.root on a disk of the host's own."""
    case.patch(storage, "PATIENCE_S", 0.2)
    own = case.folder / ("own" if case.rank == OWN else "shared")
    own.mkdir(exist_ok=True)
    os.chdir(own)


def stale_rename(case: Case) -> None:
    """A file system that shows one rank the old name only."""
    case.patch(storage, "PATIENCE_S", 0.2)
    usual = storage._listed
    if case.rank == OWN:
        case.patch(storage, "_listed", lambda folder: set() if "renamed" in folder.name else usual(folder))


def other_content(case: Case) -> None:
    usual = storage._content
    if case.rank == OWN:
        case.patch(storage, "_write", lambda folder, rank: spoil(folder, rank, usual))


def spoil(folder: Path, rank: int, usual: Callable[[Path, int], bytes]) -> storage.Nothing:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank_{rank:05d}").write_bytes(usual(folder, rank).upper())
    return storage.Nothing()


def full_disk(case: Case) -> None:
    if case.rank == OWN:
        found = os.statvfs(case.folder)
        small = os.statvfs_result((found.f_bsize, found.f_frsize, *found[2:4], 1, *found[5:]))
        case.patch(os, "statvfs", lambda path: small)


def no_inodes(case: Case) -> None:
    if case.rank == OWN:
        found = os.statvfs(case.folder)
        case.patch(os, "statvfs", lambda path: os.statvfs_result((*found[:5], 1000, 3, 3, *found[8:])))


def wrong_sum(case: Case) -> None:
    """A rank whose all-reduce in the EP group flips a bit."""
    usual = dist.all_reduce

    def spoilt(x: Any, *words: Any, **options: Any) -> Any:
        usual(x, *words, **options)
        if case.rank == OWN and options["group"] is not dist.group.WORLD and dist.get_rank(options["group"]) == 1:
            x.view(-1)[-1] ^= 1

    case.patch(dist, "all_reduce", spoilt)


def wrong_exchange(case: Case) -> None:
    usual = dist.all_to_all_single

    def spoilt(out: Any, *words: Any, **options: Any) -> Any:
        usual(out, *words, **options)
        if case.rank == OWN:
            out.copy_(out.flip(0))

    case.patch(dist, "all_to_all_single", spoilt)


def slow(case: Case) -> None:
    """By its clock, messages of one rank take 20 ms longer."""
    usual, clock = dist.batch_isend_irecv, exchange.perf_counter

    def late(messages: Any) -> Any:
        clock.now += 0.02 if case.rank == OWN else 0.0
        return usual(messages)

    case.patch(dist, "batch_isend_irecv", late)


def little_memory(case: Case) -> None:
    if case.rank == OWN:
        case.patch(memory, "host_free", lambda *_: 1000)


def fast_clock(case: Case) -> None:
    now = 1090.0 if case.rank == OWN else 1000.0
    case.patch(same, "time", type("stopped", (), {"time": staticmethod(lambda: now)}))


def raises(case: Case) -> None:
    def fail(*_: Any) -> Any:
        raise PermissionError("planted")

    if case.rank == OWN:
        for where, name in ((same, "source_hash"), (os, "statvfs"), (storage, "_look"), (memory, "host_free")):
            case.patch(where, name, fail)


FAILS = {
    version: {"versions": "torch: 2.13.* on ranks 0, 2, 3; 2.11.0 on rank 1"},
    source: {"versions": "source: [0-9a-f]{16} on ranks 0, 2, 3; another on rank 1"},
    setting: {"configuration": r"rank 1 were started with other values than rank 0 \(rank 1: optim.lr = 0.3\)"},
    data: {"data": "ffffffffffff of .* tokens on rank 1"},
    private_folder: {"run.root": "ranks 0, 1, 2, 3 do not see what ranks 0, 1, 2, 3 have just written"},
    stale_rename: {"run.root": "rank 1 do not see what .* have just written once their folder was renamed"},
    other_content: {"run.root": "ranks .* read something else"},
    full_disk: {"disk": r"0.00 GiB free, 2 checkpoints at once need 0.00 GiB"},
    no_inodes: {"disk": "3 inodes are free, the run needs up to 76"},
    wrong_sum: {"EP group": "all-reduce gave wrong values on rank 1"},
    wrong_exchange: dict.fromkeys(GROUPS, "all-to-all gave wrong values on rank 1"),
    little_memory: {"memory": "do not fit: ranks 0, 1, 2, 3 on .* of 0.00 GiB"},
    raises: dict.fromkeys(("versions", "run.root", "disk", "memory"), "PermissionError: planted on rank 1"),
}
WARNS = {
    slow: {"world speed": r"messages with rank 1 take longer than the median of 1.0 ms: rank 1 21.0x$"},
    fast_clock: {"clocks": r"the clock of rank 1 is 90\.0 s ahead of that of rank "},
}
PLANTS: list[Callable[[Case], None]] = [nothing, *FAILS, *WARNS]


class Clock:
    """Goes on by a millisecond whenever somebody looks, so that no load of this machine is taken for a slow rank."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def examined(rank: int, world: int, folder: str, corpus: Corpus) -> list[list[dict[str, Any]]]:
    """What ``examine`` finds of each plant."""
    mesh, known = mesh_of_world(2, CPU), origin(world)
    exchange.NUM_BYTES, exchange.REPEATS, exchange.perf_counter = 2**14, 1, Clock()
    config = tiny(train__checkpoint_every=2, train__keep_checkpoints=1, run__root="outputs", engine__ep_size=2)
    os.chdir(folder)
    found = []
    for plant in PLANTS:
        with ExitStack() as stack:
            case = Case(rank, Path(folder), config, corpus, known, stack)
            plant(case)
            found.append([asdict(one) for one in examine(case.config, mesh, case.corpus, case.origin)])
        os.chdir(folder)
        dist.barrier()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preflight")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Corpus:
    (folder / "text.txt").write_text("In the beginning. " * 50)
    settings = DataConfig(source="text", path=str(folder / "text.txt"), tokenizer="byte", cache=str(folder / "cache"))
    return prepare(settings, context=8)


@pytest.fixture(scope="module")
def findings(folder: Path, corpus: Corpus) -> dict[Callable[[Case], None], list[list[Finding]]]:
    """Of each plant, what each rank heard."""
    heard = run_ranks(WORLD, examined, str(folder), corpus)
    return {
        plant: [[Finding(**one) for one in of_rank[number]] for of_rank in heard] for number, plant in enumerate(PLANTS)
    }


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found_by_all_ranks_and_nothing_else(findings: Any, plant: Callable[[Case], None]) -> None:
    heard = findings[plant]
    assert all(of_rank == heard[0] for of_rank in heard), "the same on every rank"
    wrong = {one.check: one for one in heard[0] if not one.ok}
    expected = FAILS.get(plant, WARNS.get(plant, {}))
    assert wrong.keys() == expected.keys()
    for check, said in expected.items():
        assert wrong[check].fix
        assert re.search(said, wrong[check].detail), wrong[check].detail
    if plant in FAILS:
        with pytest.raises(ConfigError) as caught:
            refuse(heard[0])
        assert [one.field for one in caught.value.problems] == [f"preflight.{check}" for check in wrong]
    else:
        refuse(heard[0])
        assert [one.partition(":")[0] for one in warnings(heard[0])] == list(expected)


def test_nothing_is_left_in_the_run_root(findings: Any, folder: Path) -> None:
    assert findings
    left = {path.name for path in folder.rglob(".preflight*")}
    assert not left


def test_speeds_are_told_of_each_group(findings: Any) -> None:
    said = {one.check: one.detail for one in findings[nothing][0]}
    for kind, size in (("world", WORLD), ("EP", 2), ("expert-DP", 2)):
        assert re.search(rf"^{size} ranks: all-reduce [\d,]+ MiB/s, all-to-all [\d,]+ MiB/s$", said[f"{kind} group"])
