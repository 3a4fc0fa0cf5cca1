"""Mixture of Depths in a whole model: names, counts, rules, and every layout against one process."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moetrain.checks import parse
from moetrain.engine import make_engine
from moetrain.models.counts import size_report
from moetrain.models.decoder import Decoder
from moetrain.models.mixture_of_depths import is_depth_block, num_through
from moetrain.parallel.mesh import Mesh, mesh_of_world
from moetrain.plan import dry_run
from moetrain.types import ConfigError
from tests.catalog import ROUTERS, tiny_with
from tests.engine_runs import partition_everything
from tests.ranks import run_ranks
from tests.test_depths import CPU, DEPTH, built, routed
from tests.tiny import VOCAB, alone, part_of, tiny, tokens


def test_names_are_those_of_a_block_and_its_router() -> None:
    """A checkpoint of a model without depths has the other names, and they start from the same weights."""
    plain = Decoder(tiny(dispatch="local", **{**DEPTH, "model__depth_every": 0}), alone(), VOCAB).state_dict()
    ours = built().state_dict()
    assert set(ours) - set(plain) == {f"blocks.1.depth.{name}" for name in ("gate", "predictor", "predictor_bias")}
    for name, weight in plain.items():
        assert torch.equal(ours[name], weight), name


def test_which_blocks_and_how_many_tokens() -> None:
    def model(every: int, fraction: float = 0.125) -> Any:
        return dataclasses.replace(tiny().model, depth_every=every, depth_fraction=fraction)

    found = {every: [is_depth_block(model(every), i) for i in range(6)] for every in (0, 1, 2, 3)}
    assert found == {0: [False] * 6, 1: [True] * 6, 2: [False, True] * 3, 3: [False, False, True] * 2}
    counts = [
        num_through(model(2, fraction), num) for fraction, num in ((0.125, 16), (0.125, 17), (0.07, 100), (0.1, 3))
    ]
    assert counts == [2, 3, 7, 1]
    assert num_through(model(2, 1.0), 16) == 16


def test_counts_are_those_of_the_module_and_of_what_a_token_uses() -> None:
    """At context 16 a quarter is 4 tokens: a quarter of the block's weights, a sixteenth of its attention."""
    config = tiny(dispatch="padded", capacity__factor_train=1.0, capacity__minimum=1, model__depth_every=2)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, depth_fraction=0.25))
    model = Decoder(config, alone(), VOCAB)
    report = size_report(config, VOCAB)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert report.total == sum(sizes.values())
    idle = sum(size for name, size in sizes.items() if name in model.expert_names()) * 6 // 8
    passed_by = {name: size for name, size in sizes.items() if name.startswith("blocks.1.") and ".depth." not in name}
    used = sum(size // 4 if ".experts." in name else size for name, size in passed_by.items())
    assert report.active == report.total - idle - used * 3 // 4
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(tokens(2, 16))
    other_half = 2 * config.model.num_heads * config.model.head_dim * 16 * (1 + 1 / 16)
    assert counter.get_total_flops() / 32 == pytest.approx(report.flops_per_token / 3 + other_half, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"experts__allow_noncausal": False}, "experts.allow_noncausal", "compares a token with later ones"),
        (
            {"dispatch": "padded", "capacity__factor_train": 1.0, "capacity__factor_eval": 1.0},
            "dispatch._target_",
            "one",
        ),
        ({"capacity__scope": "global"}, "capacity.scope", "in evaluation each rank"),
        ({"model__depth_fraction": 0.0}, "model.depth_fraction", "greater than 0"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], field: str, reason: str) -> None:
    right = {"model__depth_every": 2, "experts__allow_noncausal": True}
    container = dataclasses.asdict(tiny(**right))
    parse(container, 1)
    fraction = changes.pop("model__depth_fraction", 0.125)
    container = dataclasses.asdict(tiny(**{**right, **changes}))
    container["model"]["depth_fraction"] = fraction
    with pytest.raises(ConfigError) as caught:
        parse(container, 1)
    (problem,) = caught.value.problems
    assert problem.field == field
    assert reason in problem.reason


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_routes_those_who_go_through(name: str) -> None:
    """A shorter sequence in training; in evaluation tokens of several sequences together, or none."""
    config = tiny_with(name, dispatch="local", **{**DEPTH, "model__context": 16, "model__depth_fraction": 0.25})
    model, batch = Decoder(config, alone(), VOCAB), tokens(4, 16)
    model(batch).loss.backward()
    model.commit_load()
    assert torch.isfinite(routed(model).depth.gate.grad).all()
    for bias in (0.0, -1e4):
        with torch.no_grad():
            routed(model).depth.predictor_bias.fill_(bias)
            assert torch.isfinite(model.eval()(batch).loss), bias


def test_a_plan_can_be_made_of_it() -> None:
    dry_run(tiny(**DEPTH, experts__allow_noncausal=True), 4)


LAYOUTS = [("local", 2, 0, True), ("deepspeed", 2, 2, False), ("deepspeed", 1, 3, True), ("deepspeed", 2, 3, False)]


def train(engine: str, ep: int, zero: int, recompute: bool, mesh: Mesh) -> dict[str, Any]:
    """Two steps of one global batch of 4, then an evaluation in which nobody goes through on rank 0."""
    micro_batch = 4 // mesh.world_size
    config = tiny(
        dispatch="alltoall",
        **DEPTH,
        engine__name=engine,
        engine__zero_stage=zero,
        engine__ep_size=ep,
        engine__recompute=recompute,
        train__micro_batch=micro_batch,
        model__num_layers=3,
        optim__clip_norm=1.0,
    )
    model = Decoder(config, mesh, VOCAB)
    trained = make_engine(config, model, mesh, 1)
    found: dict[str, Any] = {"losses": [], "depth": []}
    for step in range(2):
        mine = part_of(tokens(4, 12, seed=step), mesh.rank * micro_batch, (mesh.rank + 1) * micro_batch)
        out = trained.forward_backward(mine)
        model.commit_load()
        found["losses"].append(out.loss.item())
        found["depth"].append(out.losses.depth.item())
        trained.step(0.5)
        found["load"] = model.take_load().assigned_LE.sum(1).numpy()
    found["weights"] = whole(model, zero)
    found["eval"] = float(trained.evaluate(mine).lm)
    if zero < 3:
        found["uneven"] = uneven(trained, mesh)
    return found


def uneven(trained: Any, mesh: Mesh) -> list[float]:
    """Evaluation where nobody goes through on rank 0 and all do on rank 1; alone: first the one, then the other."""
    bias, found = routed(trained.model).depth.predictor_bias, []
    cases = [(1e4 if mesh.rank else -1e4, mesh.rank)] if mesh.world_size > 1 else [(-1e4, 0), (1e4, 1)]
    for value, number in cases:
        with torch.no_grad():
            bias.fill_(value)
        found.append(float(trained.evaluate(part_of(tokens(4, 12, seed=9), 2 * number, 2 * number + 2)).lm))
    return found


def whole(model: Decoder, zero: int) -> dict[str, np.ndarray]:
    if zero < 3:
        return {name: p.detach().clone().numpy() for name, p in model.named_parameters()}
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: p.detach().clone().numpy() for name, p in model.named_parameters()}


def train_all(rank: int, world: int) -> list[dict[str, Any]]:
    partition_everything()
    return [train(*layout, mesh_of_world(layout[1], CPU)) for layout in LAYOUTS]


def test_every_layout_equals_one_process() -> None:
    by_rank = run_ranks(2, train_all)
    expected = train("local", 1, 0, False, alone())
    for number, layout in enumerate(LAYOUTS):
        ranks = [found[number] for found in by_rank]
        for kind in ("losses", "depth", "eval"):
            mean = np.mean([found[kind] for found in ranks], axis=0)
            np.testing.assert_allclose(mean, expected[kind], rtol=1e-5, err_msg=f"{layout} {kind}")
        np.testing.assert_array_equal(sum(found["load"] for found in ranks), expected["load"])
        if "uneven" in ranks[0]:
            np.testing.assert_allclose(ranks[0]["uneven"] + ranks[1]["uneven"], expected["uneven"], rtol=1e-5)
        for name, weight in expected["weights"].items():
            parts = [found["weights"][name] for found in ranks[: layout[1] if ".experts." in name else 1]]
            error = np.linalg.norm(np.concatenate(parts) - weight) / np.linalg.norm(weight)
            assert error < 1e-5, f"{layout} {name}: {error:.1e}"
