"""kill -9 at random moments of two ranks that do nothing but save: every time the newest checkpoint that was finished
is there, whole and of one step, and the ranks go on from it.

MOETRAIN_KILLS sets how often; fifty times where nothing is said.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import time
from datetime import timedelta
from multiprocessing.context import ForkServerProcess
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moetrain.checkpoint import Keep, find
from moetrain.parallel.mesh import mesh_of_world
from tests.ranks import PRELOAD
from tests.saved import CPU, ONE, loaded, saver, state_of

NUM_KILLS = int(os.environ.get("MOETRAIN_KILLS", "50"))
WORLD, SIZE = 2, 200_000


def of_step(step: int) -> dict[str, torch.Tensor]:
    """Every value is the step; so a mixture is seen."""
    return {f"weight/{name}": torch.full((SIZE + i,), float(step)) for i, name in enumerate("abcd")}


def save_forever(rank: int, store: str, folder: str, background: bool, finished: Synchronized[int]) -> None:
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=200)
    )
    mesh = mesh_of_world(1, CPU)
    source = find(Path(folder), mesh)
    step = 0 if source is None else source.step
    if source is not None:
        tensors = of_step(0)
        source.fill(state_of(tensors, mesh))
        assert all(bool((piece.values_X == step).all()) for piece in state_of(tensors, mesh).held)
    one = saver(Path(folder), mesh, Keep(newest=2, every=7), background=background)
    while True:
        step += 1
        one.save(step, state_of(of_step(step), mesh), [], {"step": step})
        if rank == 0 and one.newest is not None:
            finished.value = int(one.newest.name.removeprefix("step_"))
        one.poll()


def kill(process: ForkServerProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)


def one_life(folder: Path, number: int, rng: random.Random) -> tuple[int, int]:
    """Start, wait until something was saved, kill a rank and then the other. Steps: finished for certain, and found."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, __name__])
    finished = context.Value("q", 0)
    args = (str(folder / f"store{number}"), str(folder / "checkpoints"), number % 2 == 1, finished)
    ranks: list[ForkServerProcess] = [
        context.Process(target=save_forever, args=(rank, *args), daemon=True) for rank in range(WORLD)
    ]
    try:
        for process in ranks:
            process.start()
        deadline = time.monotonic() + 200
        while finished.value == 0:
            assert time.monotonic() < deadline
            assert all(process.is_alive() for process in ranks)
            time.sleep(0.002)
        time.sleep(rng.random() * 0.1)
        victim = rng.randrange(WORLD)
        kill(ranks[victim])
        time.sleep(rng.random() * 0.02)
        with contextlib.suppress(ProcessLookupError):  # it may have noticed, and gone, by itself
            kill(ranks[1 - victim])
    finally:
        for process in ranks:
            process.kill()
            process.join()
    source = find(folder / "checkpoints", ONE)
    assert source is not None
    tensors = loaded(source, of_step(0))
    assert source.extra == {"step": source.step}
    assert all(bool((tensor == source.step).all()) for tensor in tensors.values())
    return finished.value, source.step


def test_after_every_kill_the_newest_that_was_finished_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng, before, torn = random.Random(0), 0, 0
    for number in range(NUM_KILLS):
        finished, found = one_life(tmp_path, number, rng)
        assert found >= finished > before
        torn += any((tmp_path / "checkpoints").glob("*.tmp"))
        before = found
    assert torn > 0  # some were killed while they wrote
    assert not caplog.records  # and nothing was ever damaged
    print(f"{NUM_KILLS} kills, {torn} in the middle of a save, the last of step {before}")
