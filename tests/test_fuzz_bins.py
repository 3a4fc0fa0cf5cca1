"""Broken bins, run records and rollbacks: a clear error that names the file, or what was written. Nothing is run."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moetrain.config import DataConfig
from moetrain.data import Corpus, Loader, prepare
from moetrain.health.rollback import Rollbacks, _jumps
from moetrain.monitor.runfolder import RunFolder, read_record
from moetrain.types import ConfigError
from tests.test_checkpoint_faults import ODD, Bomb, mutate
from tests.tiny import alone

NUM_CASES = int(os.environ.get("MOETRAIN_FUZZ", "1000"))
NUM_RECORDS = NUM_CASES * 4 // 3
FILES = ("meta.json", "train.bin", "train_starts.npy", "validation.bin", "validation_starts.npy")
MOST_BYTES = 200 * 2**20
CONTEXT = 16


@pytest.fixture(scope="module")
def bins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bins")
    (folder / "texts").mkdir()
    for number in range(6):
        (folder / "texts" / f"{number}.txt").write_text(f"Document {number}. " + "word " * (20 + number))
    data = DataConfig(
        source="text", path=str(folder / "texts"), tokenizer="byte", cache=str(folder / "c"), validation_fraction=0.3
    )
    return prepare(data, context=CONTEXT).folder


def npy(rng: random.Random, content: bytes) -> bytes:
    """Another header over the same bytes, of the same length."""
    descriptor = rng.choice(["'<i8'", "'<f8'", "'|O'", "'<i4'", "[('a', '<i8')]", "__import__('os')", "'<i8', 'x': {}"])
    shape = rng.choice(
        ["(6,)", "(4,)", "(-4,)", "(2, 2)", "(10**12,)", "(9223372036854775807, 8)", "()", "None", "('a',)"]
    )
    header = f"{{'descr': {descriptor}, 'fortran_order': {rng.choice(['False', 'True', '1/0'])}, 'shape': {shape}, }}"
    return content[:10] + header.encode().ljust(117)[:117] + b"\n" + content[128:]


def spoil(folder: Path, rng: random.Random, mark: Path) -> str:
    """Break one file; its name."""
    name, kind = rng.choice(FILES), rng.randrange(6)
    file = folder / name
    content = bytearray(file.read_bytes())
    if kind == 0:
        for _ in range(rng.choice([1, 1, 5, 100])):
            content[rng.randrange(len(content))] = rng.randrange(256)
    elif kind == 1:
        begin, end = sorted(rng.randrange(len(content)) for _ in range(2))
        content[begin:end] = rng.choice([b"", rng.randbytes(50), b"[" * 100_000, bytes(rng.randrange(3000))])
    elif kind == 2 and name == "meta.json":
        content = bytearray(json.dumps(mutate(json.loads(content), rng)).encode())
    elif kind == 3 and name.endswith(".npy"):
        content = bytearray(npy(rng, bytes(content)))
    elif kind == 4:
        content = bytearray(pickle.dumps(Bomb(mark)).ljust(len(content), b"\0"))
    elif name.endswith(".npy"):
        values = np.frombuffer(bytes(content[128:]), dtype="<i8").copy()
        values[rng.randrange(len(values))] = rng.choice([-1, 2**62, -(2**63), 5])
        content[128:] = values.tobytes()
    elif name.endswith(".bin"):
        content[: len(content) // 4 * 4] = rng.choice([b"\xff\xff\0\0", b"\1\1\1\1"]) * (len(content) // 4)
    else:
        content = bytearray(json.dumps(rng.choice(ODD)).encode())
    file.unlink()
    if rng.random() > 0.03:
        file.write_bytes(content)
    elif rng.random() < 0.5:
        file.mkdir()
    return name


def read_all(corpus: Corpus) -> None:
    """As training and evaluation read it, documents and all."""
    loader = Loader(
        corpus=corpus, context=CONTEXT, micro_batch=2, accumulation=1, rank=0, world_size=1, seed=0, mask_documents=True
    )
    for step in range(4):
        for batch in (loader.train(step, 0), loader.validation(step)):
            assert 0 <= int(batch.tokens_BS.min()) <= int(batch.tokens_BS.max()) < corpus.vocab_size
    corpus.summary()


def test_any_bins_are_read_or_refused_by_name(bins: Path, tmp_path: Path) -> None:
    rng, said, mark = random.Random(1), [], tmp_path / "executed"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in range(NUM_CASES):
        folder = Path(shutil.copytree(bins, tmp_path / "bins"))
        name = spoil(folder, rng, mark)
        try:
            read_all(prepare(DataConfig(source="bins", path=str(folder)), context=CONTEXT))
        except ValueError as error:
            said.append((case, name, error, str(folder) in str(error) or "model.context" in str(error)))
        except Exception as error:
            raise AssertionError(f"case {case}: {name}") from error
        shutil.rmtree(folder)
    assert len(said) > NUM_CASES // 2
    assert all(named and (isinstance(e, ConfigError) or "is damaged" in str(e)) for _, _, e, named in said), said
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES
    assert not mark.exists()


RECORD = {"id": "a", "config_hash": "b", "config": {"train.steps": 3}, "starts": [{"start": 1, "launch_id": None}]}
JUMPS = [{"step": 4, "batches": 6}, {"step": 2, "batches": 9}]


def text(value: Any, rng: random.Random) -> str:
    """JSON with something odd in it, or cut, or nested without end."""
    whole = json.dumps(mutate(json.loads(json.dumps(value)), rng))
    begin, end = sorted(rng.randrange(len(whole) + 1) for _ in range(2))
    return rng.choice([whole, whole, whole[:begin] + whole[end:], whole[:begin] + "1e999" + whole[end:], "[" * 100_000])


def test_any_record_and_any_rollbacks_are_read_or_refused(tmp_path: Path) -> None:
    rng, path, refused = random.Random(2), tmp_path / "run.json", 0
    for _ in range(NUM_RECORDS):
        path.write_text(text(RECORD, rng))
        found = read_record(path)
        refused += found is None
        if found is not None:
            assert all(start.get("launch_id", "") != "another" for start in found["starts"])
            assert isinstance(found["config"], dict)
        try:
            jumps = _jumps(text(JUMPS, rng), path)
        except ValueError as error:
            assert "run.json is damaged" in str(error)  # noqa: PT017
            refused += 1
        else:
            assert all(one.step >= 0 and one.batches >= 0 for one in jumps)
    assert refused > NUM_RECORDS // 2


def test_a_run_with_damaged_rollbacks_is_told_in_a_sentence(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.rollbacks.write_text("[{")
    with pytest.raises(ConfigError) as raised:
        Rollbacks(folder, alone(), 3)
    (problem,) = raised.value.problems
    assert problem.reason.startswith(f"{folder.rollbacks} is damaged")
