"""Under every engine, two ranks: a step that is refused, or broken on one rank only, moves nothing anywhere."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moetrain.config import HealthConfig
from moetrain.engine import Engine
from moetrain.health import Guard
from moetrain.health.outliers import Outliers
from moetrain.parallel.mesh import Mesh, mesh_of_world
from tests.engine_runs import CPU, ONE, Case, engine_of, partition_everything, weights_of
from tests.ranks import run_ranks
from tests.toy import Toy, batch_of, sequences

WORLD, STEPS = 2, 7
ENGINES = [("local", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]
CASES = [Case(*engine, 2, 2, "fp32", "adamw") for engine in ENGINES]
CASES += [Case(*engine, 1, 2, "bf16", "adamw") for engine in ENGINES[2:]]
NAN = math.nan
FAULTS = {0: (NAN, 1.0), 2: (1.0, NAN), 3: (1.0, -math.inf), 5: (1e4, 1.0)}
"""What the loss of a batch, and what the gradient behind it, is multiplied by: on rank 1 alone."""
BEFORE = {"losses": [4.5 + 0.05 * i for i in range(16)], "norms": [3.0 + 0.05 * i for i in range(16)]}


@dataclass
class Seen:
    """What one rank saw: norms that were asked about and returned, reasons, and the engine after each step."""

    asked: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    kept: list[dict[str, np.ndarray]] = field(default_factory=list)


class Nobody:
    """Asks to leave or to save."""

    asked = False

    def takes_save(self) -> bool:
        return False


class Loud(nn.Module):
    """Makes the gradient behind the last norm of a toy larger, and leaves the loss as it is."""

    def __init__(self, model: Toy) -> None:
        super().__init__()
        self.factor = 1.0
        model.norm.register_full_backward_hook(lambda _, into, out: tuple(self.factor * one for one in into))


def state_of(engine: Engine) -> dict[str, np.ndarray]:
    """Weights as the model sees them, masters, moments, step counts and buffers of this rank."""
    held = {f"{piece.key} {piece.start}": piece.values_X.numpy().copy() for piece in engine.state().held}
    return held | weights_of(engine)


def run_with(case: Case, mesh: Mesh, faults: dict[int, tuple[float, float]], without: Iterable[int] = ()) -> Seen:
    """Batches in a row; what had been before them is given."""
    guard, engine, seen = Guard(HealthConfig(outlier_sigmas=50.0), mesh, Nobody()), engine_of(case, mesh), Seen()
    guard.load({**BEFORE, "bad": []})
    loud = Loud(engine.model)
    for number in sorted({*range(STEPS)} - {*without}):
        one_step(engine, mesh, guard, seen, number, loud, faults.get(number, (1.0, 1.0)))
    return seen


def one_step(
    engine: Engine, mesh: Mesh, guard: Guard, seen: Seen, number: int, loud: Loud, fault: tuple[float, float]
) -> None:
    """Two micro-batches, of which the first has the fault."""
    losses: list[Tensor] = []
    rows_2WBS = sequences(number, 4 * mesh.world_size).view(2, mesh.world_size, 2, -1)
    for micro in range(2):
        engine.model.fault, loud.factor = fault if micro == 0 else (1.0, 1.0)
        losses.append(engine.forward_backward(batch_of(rows_2WBS[micro, mesh.rank])).loss)
    engine.model.fault = 1.0
    guard.cast(torch.stack(losses).mean())

    def accepts(norm: float) -> bool:
        seen.asked.append(norm)
        return guard.accepts(norm)

    seen.norms.append(engine.step(0.1, accepts))
    bad = guard.ended(number + 1)
    seen.reasons.append("" if bad is None else bad.reason)
    seen.kept.append(state_of(engine))


def run_all(rank: int, world: int) -> list[tuple[Seen, Seen]]:
    """With the faults on rank 1; and without their batches."""
    partition_everything()
    found = []
    for case in CASES:
        mesh = mesh_of_world(case.ep_size, CPU)
        found.append((run_with(case, mesh, FAULTS if rank == 1 else {}), run_with(case, mesh, {}, without=FAULTS)))
    return found


@pytest.fixture(scope="module")
def ranks() -> list[list[tuple[Seen, Seen]]]:
    return run_ranks(WORLD, run_all)


named = pytest.mark.parametrize("index", range(len(CASES)), ids=[case.name for case in CASES])


@named
def test_all_ranks_decide_alike_and_are_asked_once(ranks: list[list[tuple[Seen, Seen]]], index: int) -> None:
    first, second = (rank[index][0] for rank in ranks)
    assert first.reasons == second.reasons
    whats = ["loss is nan", "", "norm is", "norm is", "", "deviations over", ""]
    for what, reason in zip(whats, first.reasons, strict=True):
        assert what in reason if what else not reason, reason
    for seen in (first, second):
        np.testing.assert_array_equal(seen.asked, seen.norms)
        assert [math.isfinite(norm) for norm in seen.norms] == [number not in (0, 2, 3) for number in range(STEPS)]


@named
def test_a_bad_step_moves_nothing(ranks: list[list[tuple[Seen, Seen]]], index: int) -> None:
    for rank in ranks:
        kept = rank[index][0].kept
        assert any("step" in key for key in kept[0])
        for number in range(1, STEPS):
            same = [np.array_equal(kept[number][key], value) for key, value in kept[number - 1].items()]
            assert all(same) if number in FAULTS else not any(same[:1]), number


@named
def test_what_follows_is_as_if_the_batch_had_not_been(ranks: list[list[tuple[Seen, Seen]]], index: int) -> None:
    for rank in ranks:
        seen, other = rank[index]
        good = [number for number in range(STEPS) if number not in FAULTS]
        assert [seen.norms[number] for number in good] == other.norms
        for number, wanted in zip(good, other.kept, strict=True):
            for key, value in wanted.items():
                np.testing.assert_array_equal(seen.kept[number][key], value, err_msg=f"{key} after {number}")


def test_what_stands_out_is_told_from_good_steps_only() -> None:
    """One-sided, after 16 good steps, and with a least deviation of 1 % of the median; the bad ones are forgotten."""
    outliers = Outliers(6.0, window=16)
    assert [outliers.reason(5.0, 1.0 + 0.1 * (i % 3)) for i in range(15)] == [""] * 15
    assert outliers.reason(500.0, 1.0) == ""
    assert outliers.reason(5.29, 1.0) == ""  # median 5, least deviation 0.05
    assert outliers.reason(5.31, 1.0).startswith("the loss is 5.31, 6.2 deviations over its median 5")
    for _ in range(20):
        assert outliers.reason(5.0, 9.0).startswith("the gradient norm is 9, ")
    assert outliers.reason(0.001, 0.001) == ""
    assert outliers.reason(5.0, math.inf) == "the gradient norm is inf"
    again = Outliers(6.0, window=16)
    again.load(json.loads(json.dumps(outliers.state())))
    assert again.reason(5.0, 9.0) == outliers.reason(5.0, 9.0) != ""


def test_steps_are_counted_over_a_resume() -> None:
    guard, again = (Guard(HealthConfig(max_bad_steps=2), ONE, Nobody()) for _ in range(2))
    guard.cast(torch.tensor(NAN))
    assert not guard.accepts(1.0)
    guard.ended(7)
    assert not guard.goes_back
    again.load(json.loads(json.dumps(guard.state(), allow_nan=False)))
    again.cast(torch.tensor(5.0))
    assert not again.accepts(NAN)
    again.ended(8)
    assert again.goes_back
    assert [one.step for one in again.bad] == [7, 8]
