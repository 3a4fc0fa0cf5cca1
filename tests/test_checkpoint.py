"""Checkpoints hold everything to the bit, are the same on all ranks, load in other pieces than they were saved in, and
old ones go.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import moetrain.checkpoint.store as store
from moetrain.canonical import Piece
from moetrain.checkpoint import (
    VALIDATION,
    Keep,
    NoneWhole,
    find,
    generators,
    latest,
    seed_generators,
    set_generators,
)
from moetrain.checkpoint.files import Written
from moetrain.parallel.mesh import Mesh, mesh_of_world
from tests.ranks import run_ranks
from tests.saved import CPU, ONE, loaded, opened, same, save, saver, some_tensors, state_of


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("background", [False, True])
def test_what_is_saved_comes_back_to_the_bit(tmp_path: Path, background: bool) -> None:
    tensors, extra = some_tensors(), {"sample": 12, "config": "abc", "loss": 1.5}
    one = saver(tmp_path, background=background)
    one.save(7, state_of(tensors), [], extra)
    one.finish()
    source = find(tmp_path, ONE)
    assert source is not None
    assert (source.step, source.extra, source.path) == (7, extra, one.newest)
    assert same(loaded(source, tensors), tensors)


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    tensors = some_tensors()
    file = save(tmp_path, 7, tensors) / "rank_00000.safetensors"
    found = load_file(file)
    assert found.keys() == {f"{key}@0" for key, tensor in tensors.items() if tensor.numel()}
    assert all(torch.equal(value.view(tensors[key[:-2]].shape), tensors[key[:-2]]) for key, value in found.items())


def test_a_background_save_is_of_the_moment_at_which_it_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, may_write = store.write, threading.Event()

    def slow(file: Path, header: bytes, blocks: Any) -> Written:
        if file.suffix == ".safetensors":
            assert may_write.wait(200)
        return usual(file, header, blocks)

    monkeypatch.setattr(store, "write", slow)
    tensors, one = some_tensors(1), saver(tmp_path, background=True)
    for step in (1, 2):  # the second uses the first one's memory again
        one.save(step, state_of(tensors), [], {})
        one.poll()
        assert names(tmp_path) == [f"step_{s:08d}" for s in range(1, step)] + [f"step_{step:08d}.tmp"]
        for tensor in tensors.values():
            tensor.zero_()
        may_write.set()
        while one.newest is None or one.newest.name != f"step_{step:08d}":
            one.poll()
        assert same(loaded(opened(one.newest), tensors), some_tensors(step))
        may_write.clear()
        tensors = some_tensors(2)


def test_memory_for_copies_is_there_before_the_first_save(tmp_path: Path) -> None:
    tensors, one = some_tensors(1), saver(tmp_path, background=True)
    one.reserve(state_of(tensors), [])
    reserved = one._buffer.data_ptr()
    assert one._buffer.numel() >= sum(tensor.nbytes for tensor in tensors.values())
    one.save(1, state_of(tensors), [], {})
    assert one._buffer.data_ptr() == reserved
    one.finish()


def test_old_ones_go_and_the_newest_stay(tmp_path: Path) -> None:
    for step in (5, 9, 10, 100, 123456789):
        save(tmp_path, step, {})
    assert names(tmp_path) == ["step_00000100", "step_123456789"]
    assert latest(tmp_path) == tmp_path / "step_123456789"


def test_every_mth_and_the_best_stay_too(tmp_path: Path) -> None:
    one = saver(tmp_path, keep=Keep(newest=1, every=20, best=True))
    for step in range(5, 60, 5):
        one.save(step, state_of({}), [], {VALIDATION: abs(step - 14.0)} if step % 3 else {})
    assert names(tmp_path) == [f"step_{step:08d}" for step in (10, 20, 40, 55)]  # of step 15 it is not known


def test_a_later_one_that_is_damaged_does_not_count(tmp_path: Path) -> None:
    """A run that went on from before it would otherwise remove its only good one."""
    save(tmp_path, 20, some_tensors())
    (save(tmp_path, 40, some_tensors()) / "rank_00000.safetensors").unlink()
    for step in (25, 30):
        save(tmp_path, step, some_tensors())
    assert names(tmp_path) == [f"step_{step:08d}" for step in (25, 30, 40)]
    found = find(tmp_path, ONE)
    assert found is not None
    assert found.step == 30


def test_the_same_step_can_be_saved_again(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        path = save(tmp_path, 5, some_tensors(seed))
    assert same(loaded(opened(path), some_tensors()), some_tensors(3))
    assert names(tmp_path) == ["step_00000005"]


def test_what_made_way_counts_until_the_other_is_there(tmp_path: Path) -> None:
    save(tmp_path, 4, some_tensors(4))
    path = save(tmp_path, 5, some_tensors(5))
    path.rename(path.with_name("step_00000005.old"))  # killed between the two renames
    found = find(tmp_path, ONE)
    assert found is not None
    assert found.step == 5
    save(tmp_path, 5, some_tensors(6))
    found = find(tmp_path, ONE)
    assert found is not None
    assert same(loaded(found, some_tensors()), some_tensors(6))


def test_no_folder_or_nothing_in_it_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step_00000003.tmp").mkdir()
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert latest(folder) is None
        assert find(folder, ONE) is None


def test_if_there_are_some_and_none_is_whole_that_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "step_00000004").mkdir()
    with pytest.raises(NoneWhole, match=r"step_00000004.*manifest\.json"):
        find(tmp_path, ONE)


@pytest.mark.parametrize("value", [torch.zeros(1), float("nan")])
def test_what_is_not_json_is_refused_before_anything_is_written(tmp_path: Path, value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        saver(tmp_path).save(1, state_of({}), [], {"it": value})
    assert names(tmp_path) == []


def test_another_model_is_refused_by_name_and_changes_nothing(tmp_path: Path) -> None:
    tensors = some_tensors()
    source = opened(save(tmp_path, 1, tensors))
    others: dict[str, dict[str, Tensor]] = {
        r"weight/more is not in it \(1 such": tensors | {"weight/more": torch.zeros(1)},
        r"weight/a has no place": {k: v for k, v in tensors.items() if k != "weight/a"},
        r"buffer/half is BF16 \[4, 6\] there and F32 \[6, 4\] here": tensors | {"buffer/half": torch.zeros(6, 4)},
    }
    for message, other in others.items():
        wanted = {key: torch.full_like(tensor, 1) for key, tensor in other.items()}
        with pytest.raises(ValueError, match=message):
            source.fill(state_of(wanted))
        assert all(bool((tensor == 1).all()) for tensor in wanted.values())


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    before = {piece.key.rpartition("/")[2]: piece.values_X for piece in generators(0, CPU)}
    first = torch.rand(5)
    set_generators(before, CPU)
    assert torch.equal(torch.rand(5), first)
    draws = []
    for place in ((1, 2, 0), (1, 2, 0), (2, 2, 0), (1, 3, 0), (1, 2, 1)):
        seed_generators(*place)
        draws.append(tuple(torch.rand(3).tolist()))
    assert draws[0] == draws[1]
    assert len(set(draws)) == 4


def save_and_load_on(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Saved by all ranks; loaded in the same stretches; found by two ranks."""
    mesh, path = mesh_of_world(2, CPU), Path(folder)
    for background in (False, True):
        one = saver(path / str(background), mesh, background=background)
        mine = [Piece(f"rng/{rank:05d}/cpu", 0, torch.full((9,), rank, dtype=torch.uint8))]
        one.save(3, state_of(some_tensors(), mesh), mine, {"by": rank})
        one.finish()
    source = find(path / "True", mesh)
    assert source is not None
    result: dict[str, Any] = {"extra": source.extra, "generator": source.generators(rank)["cpu"].tolist()}
    tensors = {key: torch.zeros_like(tensor) for key, tensor in some_tensors().items()}
    state = state_of(tensors, mesh)
    source.fill(state)
    wanted = state_of(some_tensors(), mesh)
    result["same"] = all(torch.equal(a.values_X, b.values_X) for a, b in zip(state.held, wanted.held, strict=True))
    if rank == 2:
        file = path / "True" / "step_00000003" / "rank_00002.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"?")  # which only rank 2 reads to the end
    torch.distributed.barrier()
    try:
        find(path / "True", mesh)
    except NoneWhole as error:
        result["damaged"] = str(error)
    return result


def test_ranks_save_together_and_one_process_reads_it_all(tmp_path: Path) -> None:
    results = run_ranks(4, save_and_load_on, str(tmp_path))
    for rank, result in enumerate(results):
        assert result["same"]
        assert result["extra"] == {"by": 0}
        assert result["generator"] == [rank] * 9
        assert "rank_00002.safetensors is damaged: its checksum differs" in result["damaged"]
    source = find(tmp_path / "False", ONE)
    assert source is not None
    assert same(loaded(source, some_tensors()), some_tensors())
    odd = Mesh(1, 3, 1, CPU)  # a stretch that begins and ends inside of others'
    tensors = {key: torch.zeros_like(tensor) for key, tensor in some_tensors().items()}
    source.fill(state_of(tensors, odd))
    wanted = {key: torch.zeros_like(tensor) for key, tensor in some_tensors().items()}
    for piece in state_of(some_tensors(), odd).held:
        wanted[piece.key].view(-1)[piece.start : piece.start + len(piece.values_X)] = piece.values_X
    assert same(tensors, wanted)
    manifest = json.loads((source.path / "manifest.json").read_text())
    assert manifest["saved_by"]["world_size"] == 4
