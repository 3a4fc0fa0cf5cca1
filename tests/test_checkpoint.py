"""Checkpoints are whole or not there, the same on all ranks, verified on loading, and hold everything to the bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moetrain.checkpoint import agree, latest, load, rng_state, save, set_rng_state
from moetrain.parallel.mesh import Mesh, mesh_of_world
from tests.ranks import run_ranks

CPU = torch.device("cpu")
ONE = Mesh(0, 1, 1, CPU)


def some_tensors(seed: int = 0) -> dict[str, Tensor]:
    whole = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    return {
        "weight.a": whole[:2],
        "weight.b": whole[2:],  # another view of one storage
        "weight.turned": whole.t(),
        "bf16": whole.bfloat16(),
        "step": torch.tensor(3.0),
        "count": torch.tensor([2**40]),
        "empty": torch.zeros(0),
    }


def test_what_is_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    tensors, extra = some_tensors(), {"sample": 12, "config": "abc", "loss": 1.5}
    checkpoint = load(save(tmp_path, 7, tensors, extra, ONE, keep=2), ONE)
    assert (checkpoint.step, checkpoint.extra) == (7, extra)
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert checkpoint.tensors[name].dtype == tensor.dtype
        assert torch.equal(checkpoint.tensors[name], tensor)


def test_old_ones_go_and_the_newest_stay(tmp_path: Path) -> None:
    for step in (5, 9, 10, 100):
        save(tmp_path, step, {}, {}, ONE, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000010", "step_00000100"]
    assert latest(tmp_path) == tmp_path / "step_00000100"


def test_the_same_step_can_be_saved_again(tmp_path: Path) -> None:
    for seed in (1, 2):
        path = save(tmp_path, 5, some_tensors(seed), {}, ONE, keep=1)
    assert torch.equal(load(path, ONE).tensors["weight.a"], some_tensors(2)["weight.a"])
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000005"]


def test_no_folder_or_nothing_whole_in_it_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step_00000003.tmp").mkdir()
    (tmp_path / "step_00000004").mkdir()  # no manifest
    assert latest(tmp_path) is None
    assert latest(tmp_path / "nowhere") is None
    assert agree(tmp_path, ONE) is None


def test_what_is_not_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save(tmp_path, 1, {}, {"tensor": torch.zeros(1)}, ONE, keep=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mesh", [Mesh(0, 4, 1, CPU), Mesh(0, 1, 2, CPU)])
def test_another_layout_is_refused_and_both_are_named(tmp_path: Path, mesh: Mesh) -> None:
    path = save(tmp_path, 1, some_tensors(), {}, ONE, keep=1)
    with pytest.raises(ValueError, match=r"saved at (world_size|ep_size) 1, this run has (world_size 4|ep_size 2)"):
        load(path, mesh)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = save(tmp_path, 1, some_tensors(), {}, ONE, keep=1)
    file = path / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-3] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-8])
    else:
        file.unlink()
    with pytest.raises(ValueError, match=r"rank_00000\.safetensors"):
        load(path, ONE)


def test_random_numbers_go_on_where_they_were() -> None:
    before = rng_state(CPU)
    first = torch.rand(5)
    set_rng_state(before, CPU)
    assert torch.equal(torch.rand(5), first)


CHILD = """
import sys, time
from pathlib import Path
import torch
import moetrain.checkpoint.store as store
from moetrain.parallel.mesh import Mesh

def stop(*_):
    print("STOPPED", flush=True)
    time.sleep(600)

def half(tensors, file):
    Path(file).write_bytes(b"half of it")
    stop()

folder, moment = Path(sys.argv[1]), sys.argv[2]
one = Mesh(0, 1, 1, torch.device("cpu"))
store.save(folder, 1, {"x": torch.ones(3)}, {}, one, keep=1)
if moment == "tensors":
    store.save_file = half
elif moment == "manifest":
    store._finish = stop
else:
    Path.rename = stop
store.save(folder, 2, {"x": torch.zeros(3)}, {}, one, keep=1)
"""


@pytest.mark.parametrize("moment", ["tensors", "manifest", "rename"])
def test_kill_9_in_the_middle_leaves_the_one_before(tmp_path: Path, moment: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), moment], stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "STOPPED\n"
        os.kill(child.pid, signal.SIGKILL)
    assert (tmp_path / "step_00000002.tmp").is_dir()
    path = latest(tmp_path)
    assert path == tmp_path / "step_00000001"
    assert torch.equal(load(path, ONE).tensors["x"], torch.ones(3))
    save(tmp_path, 2, {"x": torch.zeros(3)}, {}, ONE, keep=1)  # and the next save is not in its way
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000002"]


def save_and_load_on(rank: int, world: int, folder: str) -> dict[str, Any]:
    mesh = mesh_of_world(2, CPU)
    path = save(Path(folder), 3, {"x": torch.full((2,), float(rank))}, {"by": rank}, mesh, keep=1)
    checkpoint = load(path, mesh)
    result: dict[str, Any] = {"x": checkpoint.tensors["x"].numpy(), "extra": checkpoint.extra}
    result["agreed"] = str(agree(Path(folder) if mesh.is_main else Path("elsewhere"), mesh))
    if rank == 1:
        (path / "rank_00001.safetensors").write_bytes(b"no")
    try:
        load(path, mesh)
    except ValueError as error:
        result["damaged"] = str(error)
    try:
        blocked = Path(folder) / "a file"
        blocked.touch()
        save(blocked / "below", 3, {}, {}, mesh, keep=1)
    except OSError as error:
        result["unwritable"] = str(error)
    return result


def test_ranks_save_load_agree_and_fail_together(tmp_path: Path) -> None:
    results = run_ranks(2, save_and_load_on, str(tmp_path))
    for rank, result in enumerate(results):
        assert np.array_equal(result["x"], [rank, rank])
        assert result["extra"] == {"by": 0}
        assert "ranks [1]" in result["damaged"]
        assert "could not write" in result["unwritable"]
    assert [r["agreed"] for r in results] == [str(tmp_path / "step_00000003"), "elsewhere/step_00000003"]
