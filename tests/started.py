"""Ranks that run ``moetrain train`` as processes, without torchrun: forked from a server that has imported what they
need, so that they start quickly.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

from moetrain.cli import main
from moetrain.monitor.jsonl import read_metrics
from tests import steady
from tests.ranks import PRELOAD

TINY = (
    *("recipe=quickstart", "model=nano", "model.context=32", "model.num_layers=2"),
    *("train.global_batch=8", "train.micro_batch=2", "train.eval_every=0", "train.eval_batches=1"),
    *("train.sample_tokens=0", "optim.warmup_steps=2", "monitor.log_every=1", "machine.device=cpu", "run.id=it"),
    "health.preflight=false",
)


def _nothing(rank: int) -> None:
    """Most ranks start as they are."""


class Started:
    """``world`` ranks in ``folder``; all are gone at the end of the context."""

    def __init__(self, folder: Path, *overrides: str, world: int = 2, before: Callable[[int], None] = _nothing) -> None:
        """before: called with the rank, in its process, before it starts, with its environment."""
        self.run = folder / "outputs" / "it"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOAD, __name__])
        self.held, port = held_port()
        self.ranks: list[ForkServerProcess] = [
            context.Process(target=_rank, args=(rank, world, port, folder, (*TINY, *overrides), before), daemon=True)
            for rank in range(world)
        ]
        for process in self.ranks:
            process.start()

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.ranks:
            process.kill()
            process.join()
        self.held.close()

    def wait_for_step(self, step: int) -> None:
        """Until the metrics have that step."""
        deadline = time.monotonic() + 250
        while not any(row["train/step"] >= step for row in rows(self.run)):
            assert time.monotonic() < deadline
            assert all(process.is_alive() for process in self.ranks), said(self.run)
            time.sleep(0.01)

    def signal(self, rank: int, number: int) -> None:
        pid = self.ranks[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def codes(self, timeout: float = 250) -> list[int | None]:
        """Exit codes, -N for signal N, None for a rank that does not end."""
        for process in self.ranks:
            process.join(timeout)
        return [process.exitcode for process in self.ranks]


def held_port() -> tuple[socket.socket, int]:
    """A port of this machine for a server that says SO_REUSEADDR, as torch's store does, and of nobody else until the
    socket is closed: the system gives a bound port to no other.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held, held.getsockname()[1]


def rows(run: Path) -> list[dict[str, float]]:
    """Of metrics.jsonl, so far."""
    return list(read_metrics(run / "metrics.jsonl")) if (run / "metrics.jsonl").exists() else []


def losses(run: Path) -> dict[int, tuple[float, float]]:
    """Training loss and gradient norm by step."""
    return {
        int(row["train/step"]): (row["train/loss"], row["train/grad_norm"]) for row in rows(run) if "train/loss" in row
    }


def said(run: Path) -> str:
    """What the ranks of the latest start printed."""
    return "".join(path.read_text() for path in sorted(run.parents[1].glob("rank*.txt")))


def _rank(
    rank: int, world: int, port: int, folder: Path, overrides: tuple[str, ...], before: Callable[[int], None]
) -> None:
    os.chdir(folder)
    with open(f"rank{rank}.txt", "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    before(rank)
    torch.set_num_threads(1)
    steady.same_products()
    code = main(["train", *overrides, f"data.cache={folder}/cache"])
    with contextlib.suppress(OSError):
        os.fsync(1)
    os._exit(code)
