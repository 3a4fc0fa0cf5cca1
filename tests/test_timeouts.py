"""No wait for another rank is without an end: every group has a timeout, and so has the start."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moetrain.engine import make_engine
from moetrain.health import Watchdog
from moetrain.parallel.mesh import Mesh, _await_all, mesh_of_world
from tests.ranks import run_ranks
from tests.toy import Toy, toy_config

CPU = torch.device("cpu")
TIMEOUT_S = 77


def timeouts(rank: int, world: int) -> dict[str, int]:
    """Seconds, of every group that there is after an engine of each ZeRO stage was made."""
    mesh = mesh_of_world(2, CPU, timedelta(seconds=TIMEOUT_S))
    for stage in range(4):
        config = toy_config("deepspeed", stage)
        machine = dataclasses.replace(config.machine, timeout_s=TIMEOUT_S)
        make_engine(dataclasses.replace(config, machine=machine), Toy(mesh), mesh, 1)
    world_of_groups = dist.distributed_c10d._world
    return {name: group._get_backend(CPU).options._timeout.seconds for group, name in world_of_groups.pg_names.items()}


def test_every_group_has_the_timeout_those_of_deepspeed_too() -> None:
    for found in run_ranks(2, timeouts):
        assert len(found) >= 4  # the world, ours for EP and expert-DP, DeepSpeed's
        assert set(found.values()) == {TIMEOUT_S}


def test_who_has_not_come_to_the_start_is_named() -> None:
    store = dist.HashStore()
    store.set("moetrain/here/2", "")
    with pytest.raises(TimeoutError, match=r"ranks \[1, 3\] of 4 have not come within 0 s \(machine.timeout_s\)"):
        _await_all(store, 0, 4, timedelta(seconds=0.2))


def test_what_an_earlier_start_left_is_moved_away_and_errors_go_on(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "hang").mkdir()
        (tmp_path / "hang" / "report.txt").write_text("old")
        Watchdog(tmp_path, Mesh(0, 1, 1, CPU), 1.0)
        assert not (tmp_path / "hang").exists()
        assert (tmp_path / f"hang.{number}" / "report.txt").read_text() == "old"
    with pytest.raises(RuntimeError, match="planted"), Watchdog(tmp_path, Mesh(0, 1, 1, CPU), 1.0):
        raise RuntimeError("planted")
    assert not (tmp_path / "hang").exists()
