"""Damage is found and named, the checkpoint before is used, nothing in a file is ever executed, and a disk that fails
does not stop training.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

import moetrain.checkpoint.store as store
from moetrain.checkpoint import NoneWhole, Source, find
from moetrain.checkpoint.files import Written
from moetrain.checkpoint.manifest import MANIFEST
from moetrain.parallel.mesh import mesh_of_world
from tests.ranks import run_ranks
from tests.saved import CPU, ONE, loaded, same, save, saver, some_tensors, state_of

NUM_CASES = int(os.environ.get("MOETRAIN_FUZZ", "400"))
FILE = "rank_00000.safetensors"


def two(folder: Path) -> Path:
    """Checkpoints of steps 1 and 2; the folder of the second."""
    save(folder, 1, some_tensors(1), {"loss": 1.5})
    return save(folder, 2, some_tensors(2), {"loss": 1.5})


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def foreign(file: Path) -> None:
    """A whole file of another save, of the same size."""
    shutil.copy(file.parent.with_name("step_00000001") / file.name, file)


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "flipped value": (FILE, lambda f: flip(f, -3), "checksum differs"),
    "flipped header": (FILE, lambda f: flip(f, 12), FILE),
    "cut": (FILE, cut, r"bytes where \d+ were written"),
    "missing": (FILE, lambda f: f.unlink(), "No such file"),
    "foreign": (FILE, foreign, "checksum differs"),
    "no manifest": (MANIFEST, lambda f: f.unlink(), "No such file"),
    "cut manifest": (MANIFEST, cut, "is damaged"),
    "foreign manifest": (MANIFEST, foreign, "is of step 1"),
    "changed manifest": (MANIFEST, lambda f: f.write_text(f.read_text().replace("1.5", "2.5")), "checksum differs"),
    "another format": (MANIFEST, lambda f: f.write_text('{"format": 1}'), "is of format 1, this moetrain reads format"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_one_before_is_used(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    name, harm, said = DAMAGE[kind]
    file = two(tmp_path) / name
    harm(file)
    with caplog.at_level(logging.WARNING):
        source = find(tmp_path, ONE)
    assert source is not None
    assert source.step == 1
    assert same(loaded(source, some_tensors()), some_tensors(1))
    (record,) = caplog.records
    assert "step_00000002 is not used" in record.message
    assert file.name in record.message
    assert re.search(said, record.message), record.message


def test_a_manifest_can_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    path = two(tmp_path)
    outside = "../step_00000001/rank_00000.safetensors"
    sign(path, lambda manifest: manifest.update(files={outside: written(path / outside)}))
    with pytest.raises(ValueError, match="which is none of a checkpoint"):
        Source(path)


def test_a_link_can_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    path = two(tmp_path)
    (path / FILE).rename(tmp_path / "outside")
    (path / FILE).symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="is a link, and may lead out"):
        Source(path)


def test_a_file_that_is_no_part_of_it_is_named_and_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = two(tmp_path)
    shutil.copy(path / FILE, path / "rank_00001.safetensors")  # of a save on more ranks, say
    with caplog.at_level(logging.WARNING):
        source = find(tmp_path, ONE)
    assert source is not None
    assert source.step == 2
    assert "rank_00001.safetensors" in caplog.text


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("name", [FILE, MANIFEST, ".metadata", "model.pt"])
def test_a_planted_pickle_is_never_executed(tmp_path: Path, name: str) -> None:
    mark, path = tmp_path / "executed", two(tmp_path / "checkpoints")
    content = pickle.dumps(Bomb(mark))
    (path / name).write_bytes(content)
    sign(path, lambda manifest: manifest["files"].update({FILE: written(path / FILE)}) if name == FILE else None)
    source = find(path.parent, ONE)
    assert source is not None
    assert source.step == (1 if name in (FILE, MANIFEST) else 2)
    assert same(loaded(source, some_tensors()), some_tensors(source.step))
    assert not mark.exists()
    pickle.loads(content)
    assert mark.exists()  # it would have been seen


def written(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return {"bytes": len(content), "xxh3": xxhash.xxh3_128(content).hexdigest()}


def sign(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and give it the right hash again, as an enemy could. One that is no JSON stays."""
    try:
        body = json.loads((path / MANIFEST).read_text(encoding="latin-1"))
    except ValueError:
        return
    del body["xxh3"]
    change(body)
    body["xxh3"] = xxhash.xxh3_128(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (path / MANIFEST).write_text(json.dumps(body))


ODD = [None, -1, 2**70, 1.5, "", "../../step_00000001/rank_00000.safetensors", [], {}, {"a": 1}, [[-1]], True, "F32"]


def mutate(value: Any, rng: random.Random) -> Any:
    """Somewhere inside, something else."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.15:
        return rng.choice(ODD)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = rng.choice(keys)
    if rng.random() < 0.15:
        del value[key]
    elif isinstance(value, dict) and rng.random() < 0.15:
        value[str(rng.choice(ODD))] = value.pop(key)
    else:
        value[key] = mutate(value[key], rng)
    return value


def break_at_random(path: Path, rng: random.Random) -> None:
    """Bytes of a file, what a manifest says, or what a signed header says."""
    kind, file = rng.randrange(4), path / rng.choice([FILE, MANIFEST])
    content = bytearray(file.read_bytes())
    if kind == 0:
        for _ in range(rng.choice([1, 1, 5, 100])):
            content[rng.randrange(len(content))] = rng.randrange(256)
        file.write_bytes(content)
    elif kind == 1:
        begin, end = sorted(rng.randrange(len(content)) for _ in range(2))
        file.write_bytes(content[:begin] + rng.choice([b"", rng.randbytes(50), b"[" * 100_000]) + content[end:])
    elif kind == 2:
        sign(path, lambda manifest: mutate(manifest, rng))
    else:
        size = int.from_bytes(content[:8], "little") if file.name == FILE else 0
        if size:
            header = json.dumps(mutate(json.loads(content[8 : 8 + size]), rng)).encode()
            content = bytearray(len(header).to_bytes(8, "little") + header + content[8 + size :])
        (path / FILE).write_bytes(content)
        sign(path, lambda manifest: manifest["files"].update({FILE: written(path / FILE)}))


def test_fuzz_gives_clear_errors_or_what_was_saved(tmp_path: Path) -> None:
    """Never another exception, never other values. (Whoever signs a file with other values in it is not found out.)"""
    tensors, rng = some_tensors(2), random.Random(0)
    said: list[str] = []
    original = save(tmp_path, 2, tensors)
    for case in range(NUM_CASES):
        path = Path(shutil.copytree(original, tmp_path / str(case) / original.name))
        break_at_random(path, rng)
        try:
            source = find(path.parent, ONE)
            assert source is not None
            back = loaded(source, tensors)
        except ValueError as error:
            said.append(str(error))
        else:
            assert same(back, tensors), case
        shutil.rmtree(path.parent)
    assert len(said) > 0.6 * NUM_CASES
    assert all(len(text) < 3000 and "step_00000002" in text for text in said)


def full(file: Path, header: bytes, blocks: Any) -> Written:
    """Half of it fits."""
    file.write_bytes(header[: len(header) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("which", [".safetensors", ".json"])
def test_a_full_disk_is_told_and_the_one_before_stays(
    tmp_path: Path, background: bool, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, tensors = store.write, some_tensors(1)
    one = saver(tmp_path, background=background)
    one.save(1, state_of(tensors), [], {})
    one.finish()
    with monkeypatch.context() as patch:
        patch.setattr(store, "write", lambda f, h, b: (full if f.suffix == which else usual)(f, h, b))
        one.save(2, state_of(some_tensors(2)), [], {})
        one.finish()
    assert one.failed == 1
    assert "step_00000002 could not be written" in one.failure
    assert "No space left" in one.failure
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]  # and the half is gone: space is short
    assert same(loaded(find(tmp_path, ONE), tensors), tensors)
    one.save(3, state_of(tensors), [], {})
    one.finish()
    assert (one.failed, one.failure) == (1, "")
    assert one.newest == tmp_path / "step_00000003"


def test_a_folder_that_can_not_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    one = saver(tmp_path / "a file" / "below")
    one.save(1, state_of({}), [], {})
    assert "Not a directory" in one.failure


def fail_on_one(rank: int, world: int, folder: str) -> list[Any]:
    """The second save fails on rank 1, the first and the third work."""
    mesh, usual = mesh_of_world(1, CPU), store.write
    one, heard = saver(Path(folder), mesh, background=True), []
    for step in (1, 2, 3):
        store.write = full if (step, rank) == (2, 1) else usual
        one.save(step, state_of(some_tensors(step), mesh), [], {})
        one.finish()
        heard.append(one.failure)
    source = find(Path(folder), mesh)
    return [heard, source and source.step]


def test_all_ranks_hear_of_one_that_fails(tmp_path: Path) -> None:
    for heard, step in run_ranks(2, fail_on_one, str(tmp_path)):
        assert (heard[0], heard[2], step) == ("", "", 3)
        assert "rank 1: " in heard[1]
        assert "No space left" in heard[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]


def test_none_whole_names_them_all(tmp_path: Path) -> None:
    (two(tmp_path) / FILE).unlink()
    (tmp_path / "step_00000001" / MANIFEST).write_text("[")
    with pytest.raises(NoneWhole, match=r"step_00000002: .*No such file.*step_00000001: .*manifest.json is damaged"):
        find(tmp_path, ONE)
