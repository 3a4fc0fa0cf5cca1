"""Hot experts lent to all ranks: nothing changes but who computes; when they are, by the cost model and by hand."""

from __future__ import annotations

import json
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

import moetrain.control.rates as rates_room
from moetrain.bench.command import layer_configs
from moetrain.bench.skew import bench_skew
from moetrain.control.base import Action, Seen
from moetrain.control.cost import Load, Rates, cheapest, cost
from moetrain.control.shadow import Shadow
from moetrain.models.decoder import Decoder
from moetrain.parallel.mesh import Mesh, mesh_of_world
from moetrain.parallel.share import start_loan, take_loan
from moetrain.rules import rule_problems
from moetrain.rules.layout import PADDED
from tests.control_runs import seen
from tests.ranks import run_ranks
from tests.shadow_runs import CASES, CPU, Case, on_ranks
from tests.test_config import problems_of, raw
from tests.tiny import VOCAB, moe_layer, tiny


@pytest.mark.parametrize("world", [2, 4])
def test_a_layer_gives_the_same_with_shadows(world: int) -> None:
    """Output, every gradient and the load; only the bf16 case is less than exact to fp32 rounding."""
    for case, by_rank in zip(CASES, on_ranks(world, CASES), strict=True):
        for rank, (without, with_shadows) in enumerate(by_rank):
            assert without.keys() == with_shadows.keys()
            for name in without.keys() - {"rows", "copies"}:
                expected, allowed = without[name], 1e-5 if case.dtype == torch.float32 else 2e-2
                error = np.abs(with_shadows[name] - expected).max()
                assert error <= allowed * max(1.0, np.abs(expected).max()), (case, rank, name, error)
        for name in ("rows", "copies"):
            before, after = (sum(one[which][name] for one in by_rank) for which in (0, 1))
            assert (after == before) if name == "rows" else (after <= before), (case, name)


@pytest.mark.parametrize("world", [2, 4])
def test_what_is_hot_stays_where_it_is(world: int) -> None:
    """All tokens want experts 2 and 3: one rank has all rows, or each those of its own 24 tokens."""
    cases = [Case("all_to_one", (2, 3)), Case("random", tuple(range(8)))]
    to_one, everything = on_ranks(world, cases)
    assert sorted(without["rows"] for without, _ in to_one)[-2:] == [0, 48 * world]
    for _, with_shadows in (*to_one, *everything):
        assert with_shadows["rows"] == 48
        assert with_shadows["copies"] == 0


class Whole(torch.autograd.Function):
    """Stands for the experts: what it gives a stack as a gradient is a tensor of its own."""

    @staticmethod
    def forward(ctx: Any, made: list[int], own_eX: torch.Tensor, lent_sX: torch.Tensor) -> torch.Tensor:
        ctx.made, ctx.shapes = made, (own_eX.shape, lent_sX.shape)
        return own_eX.sum() + lent_sX.sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        own_eX, lent_sX = (torch.ones(shape) for shape in ctx.shapes)
        ctx.made.append(own_eX.data_ptr())
        return None, own_eX, 2 * lent_sX


def test_gradients_of_the_lent_are_added_where_the_owners_lie() -> None:
    """No second tensor of the size of all experts, be it zero or a copy."""
    stack_eX, made = torch.ones(4, 3).requires_grad_(), list[int]()
    loan = start_loan((stack_eX,), (1, 3), 0, None)
    Whole.apply(made, loan.own[0], take_loan(loan)[0]).backward()
    assert stack_eX.grad is not None
    assert stack_eX.grad[:, 0].tolist() == [1, 3, 1, 3]
    assert made == [stack_eX.grad.data_ptr()]


def test_a_loan_of_which_only_the_copies_are_used() -> None:
    stack_eX = torch.ones(4, 3).requires_grad_()
    take_loan(start_loan((stack_eX,), (1, 3), 0, None))[0].sum().backward()
    assert stack_eX.grad is not None
    assert stack_eX.grad[:, 0].tolist() == [0, 1, 0, 1]


RATES = Rates(row=1.0, copy=0.0, loan=10.0, ep_size=4)
SKEWED = np.array([400.0, 0, 40, 60, 50, 50, 60, 40])


def test_the_cost_by_hand() -> None:
    """Two experts a rank. Of 350 tokens, 4/7 of whose choices lie on rank 0, 1 - (3/7)^2 are sent there."""
    load = Load(SKEWED, 2.0, merged=False)
    assert cost(load, (), RATES).seconds == 400
    assert cost(load, (0,), RATES).seconds == 100 + 400 / 4 + 10
    assert cost(load, (0, 3), RATES).seconds == 100 + 460 / 4 + 20
    assert cost(load, (), RATES).copies == 400 * 3 / 4
    copies = cost(Load(SKEWED, 2.0, merged=True), (), RATES).copies
    assert copies == pytest.approx(350 * (1 - (3 / 7) ** 2) * 3 / 4)
    slow_network = Rates(row=1.0, copy=2.0, loan=10.0, ep_size=4)
    assert cost(load, (0,), slow_network).seconds == 100 + 100 + 2 * 100 * 3 / 4 + 10


@pytest.mark.parametrize(
    ("rows", "loan", "most", "expected"),
    [
        (SKEWED, 10.0, 8, (0,)),
        (SKEWED, 199.0, 8, (0,)),
        (SKEWED, 200.0, 8, ()),  # what it saves it costs
        ([300, 280, 0, 20, 20, 20, 20, 20], 10.0, 8, (0, 1)),
        ([300, 280, 0, 20, 20, 20, 20, 20], 10.0, 1, (0,)),
        ([20, 20, 20, 20, 20, 20, 280, 300], 10.0, 8, (6, 7)),
        ([300, 0, 10, 10, 10, 10, 0, 300], 10.0, 8, (0, 7)),  # the first of them alone saves nothing
        ([50] * 8, 1.0, 8, ()),
        ([0] * 8, 1.0, 8, ()),
    ],
)
def test_the_experts_that_are_chosen(rows: list[float], loan: float, most: int, expected: tuple[int, ...]) -> None:
    assert cheapest(Load(np.array(rows, float), 2.0, False), most, Rates(1.0, 0.0, loan, 4)) == expected


def controller(
    gain: float = 0.2, rates: Rates | None = RATES, ep_size: int = 4, payload: str = "exact"
) -> tuple[Shadow, Decoder]:
    mesh = Mesh(rank=0, world_size=4, ep_size=ep_size, device=CPU)
    config = tiny(control__shadow_gain=gain, dispatch="dedup", dispatch__payload=payload, train__global_batch=16)
    model = Decoder(config, mesh, VOCAB)
    shadow = Shadow(config, gain, model, mesh)
    if rates is not None:
        shadow.load(shadow.state() | {"rates": vars(rates)})
    return shadow, model


EVEN = [50] * 8
"""Ten steps of two micro-batches: everything that a micro-batch costs times 20."""


def windows(*layers: list[float]) -> Seen:
    return seen([[round(20 * rows) for rows in layer] for layer in layers])


def acts(shadow: Shadow, *layers: list[float]) -> list[Action]:
    return shadow.act(windows(*layers))


def test_what_pays_is_done_and_undone() -> None:
    shadow, model = controller()
    hot = lambda: [layer.shadows.hot for layer in model.moe_layers()]  # noqa: E731
    (action,) = acts(shadow, EVEN, list(SKEWED))
    assert hot() == [(), (0,)]
    assert shadow.numbers() == {"control/shadowed": 1.0}
    assert "layer 1: experts 0 are shadowed: busiest rank 2.29x -> 1.14x its share of 175 rows" in action.message
    assert "4.2e+05 ms a step by the cost model" in action.message
    assert (action.data["experts"], action.data["before"]) == ([0], [])
    assert acts(shadow, EVEN, list(SKEWED)) == []
    assert acts(shadow, EVEN, [140, 0, 40, 60, 50, 50, 60, 40]) == []  # to go back would gain less than a fifth
    (action,) = acts(shadow, EVEN, [5] * 8)
    assert "layer 1: no expert is shadowed any more" in action.message
    assert hot() == [(), ()]


def test_little_is_not_enough() -> None:
    """100 + 170 / 4 + 12 instead of 170 is 9 % less."""
    rates, layer = Rates(row=1.0, copy=0.0, loan=12.0, ep_size=4), [170.0, 0, 40, 60, 50, 50, 60, 40]
    assert acts(controller(0.1, rates)[0], layer, EVEN) == []
    (action,) = acts(controller(0.05, rates)[0], layer, EVEN)
    assert action.data["experts"] == [0]


def test_a_resumed_controller_decides_alike() -> None:
    shadow, _ = controller()
    acts(shadow, list(SKEWED), EVEN)
    other, hot = resumed(shadow)
    assert hot == [(0,), ()]
    for window in ((EVEN, list(SKEWED)), (EVEN, EVEN)):
        assert acts(shadow, *window) == acts(other, *window)
        assert shadow.state() == other.state()


def resumed(shadow: Shadow, **changes: Any) -> tuple[Shadow, list[tuple[int, ...]]]:
    """Under another layout, and what is hot then."""
    other, model = controller(rates=None, **changes)
    other.load(json.loads(json.dumps(shadow.state())))
    return other, [layer.shadows.hot for layer in model.moe_layers()]


def test_another_ep_size_measures_anew_and_keeps_what_is_hot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank gives an expert 32 tokens x 2 choices x 2 ranks / 8 = 16 rows, and 16 of its 32 tokens to the other."""
    shadow, _ = controller()
    acts(shadow, list(SKEWED), EVEN)
    other, hot = resumed(shadow, ep_size=2)
    assert hot == [(0,), ()]
    seconds = iter([48.0, 80.0, 7.0])
    monkeypatch.setattr(rates_room, "_best", lambda run, mesh: run() and next(seconds))
    first, *_ = acts(other, list(SKEWED), EVEN)
    assert first.message.startswith("measured, forward and backward: ")
    assert other.state()["rates"] == {"row": 3.0, "copy": 5.0, "loan": 7.0, "ep_size": 2}


def test_other_hardware_or_another_payload_measures_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    shadow, _ = controller()
    assert resumed(shadow)[0].state()["rates"] == vars(RATES)
    assert resumed(shadow, payload="bf16")[0].state()["rates"] is None
    monkeypatch.setattr(rates_room, "processor", lambda: "another")
    assert resumed(shadow)[0].state()["rates"] is None


def test_one_process_lends_to_nobody() -> None:
    """As a run with run.elastic=true may go on."""
    shadow, _ = controller()
    acts(shadow, list(SKEWED), EVEN)
    alone, hot = resumed(shadow, ep_size=1)
    assert hot == [(), ()]
    assert acts(alone, list(SKEWED), EVEN) == []
    assert alone.state()["rates"] is None


def bytes_of_copies(rank: int, world: int) -> dict[str, int]:
    """Sent by one round of what measures a copy, for a row of 16 numbers in fp32."""
    mesh, found, plain = mesh_of_world(world, CPU), dict[str, int](), torch.distributed.all_to_all_single
    for payload in ("exact", "bf16", "fp8"):
        sent = list[int]()

        def counted(out: torch.Tensor, x: torch.Tensor, *rest: Any, sent: list[int] = sent, **more: Any) -> Any:
            sent.append(x.nbytes)
            return plain(out, x, *rest, **more)

        layer = moe_layer(tiny(dispatch="dedup", dispatch__payload=payload), mesh)
        run = rates_room._copies(layer.dispatcher, torch.ones(4, 16, requires_grad=True), mesh)
        with patch.object(torch.distributed, "all_to_all_single", counted):
            run()
        found[payload] = sum(sent) // 4
    return found


def test_copies_are_measured_under_the_payload() -> None:
    """Four ways; out under fp8 16 codes and a scale, the others bf16."""
    expected = {"exact": 4 * 16 * 4, "bf16": 4 * 16 * 2, "fp8": 16 + 4 + 3 * 16 * 2}
    assert run_ranks(2, bytes_of_copies) == [expected] * 2


def test_triton_and_shadows_are_refused() -> None:
    values = {"control.shadow_gain": 0.1, "machine.experts_kernel": "triton"}
    (problem,) = rule_problems(values)
    assert (problem.field, "not measured together" in problem.reason) == ("control.shadow_gain", True)
    assert rule_problems(values | {"control.shadow_gain": None}) == []
    assert rule_problems(values | {"machine.experts_kernel": "torch"}) == []


LIMITED = {"capacity__factor_train": 1.0, "capacity__factor_eval": 1.0}
RULES = [
    ({"control__shadow_gain": 0.1, "engine__ep_size": 1}, "every rank holds all experts"),
    ({"control__shadow_gain": 0.1, "dispatch___target_": PADDED, **LIMITED}, "padded dispatcher"),
    ({"control__shadow_gain": 0.1, "engine__name": "deepspeed", "engine__zero_stage": 3}, "zero_stage = 3"),
]


@pytest.mark.parametrize(("changes", "reason"), RULES)
def test_what_can_not_be_lent_is_refused(changes: dict[str, object], reason: str) -> None:
    found = problems_of(raw(**changes), 2)
    assert [(p.field, reason in p.reason) for p in found] == [("control.shadow_gain", True)]


def skewed(rank: int, world: int) -> list[tuple[str, str, float, int]]:
    words = ["model.dim=32", "model.expert_dim=16", "model.context=64", "experts=e8", "machine.device=cpu"]
    (config,) = layer_configs(words, world, None)
    results = bench_skew(config, mesh_of_world(world, CPU), rounds=1, times=1.5, num_hot=3)
    return [(one.name, one.routing, one.case["busiest"], len(one.samples)) for one in results]


def test_the_benchmark_plants_the_skew_that_it_is_asked_for() -> None:
    balanced, without, with_shadows = run_ranks(2, skewed)[0]
    assert balanced == ("balanced", "balanced", 1.0, 1)
    assert without == ("skewed", "skewed", 1.5, 1)
    assert with_shadows[:2] == ("shadowed", "skewed")
