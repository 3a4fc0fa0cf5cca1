"""What travels between ranks: how it looks on the way, how much there is, and that nobody waits for it too early."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from moetrain.bench.race import Contestant, bytes_sent
from moetrain.moe.journey import set_out, travel
from moetrain.moe.layer import MoELayer
from moetrain.moe.replay import Replay
from moetrain.parallel.exchange import Route, start_rows, wait_rows
from moetrain.parallel.mesh import Mesh, mesh_of_world
from moetrain.parallel.wire import BLOCK, Payload, decode, encode, width
from moetrain.types import Dispatched
from tests.ranks import run_ranks
from tests.tiny import ids, moe_layer, seen, tiny

CPU = torch.device("cpu")
TOKENS = 24


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(1, 300), st.integers(-30, 30), st.integers(0, 10**6))
def test_what_is_rounded_on_its_way_is_as_near_as_stated(rows: int, dim: int, exponent: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_RD = torch.randn(rows, dim, generator=generator) * torch.rand(rows, dim, generator=generator) ** 8 * 2.0**exponent
    largest_RD = torch.nn.functional.pad(x_RD.abs(), (0, -dim % BLOCK)).unflatten(1, (-1, BLOCK)).amax(-1)
    largest_RD = largest_RD.repeat_interleave(BLOCK, dim=1)[:, :dim]
    for payload, relative, absolute in (("exact", 0.0, 0.0), ("bf16", 2**-8, 0.0), ("fp8", 2**-4, 2**-10 / 448)):
        sent_RX = encode(x_RD, payload)
        assert (sent_RX.shape[1], sent_RX.dtype) == width(payload, dim, torch.float32)
        error_RD = (decode(sent_RX, payload, dim, torch.float32) - x_RD).abs()
        limit_RD = torch.maximum(relative * x_RD.abs(), absolute * largest_RD) * 1.0001
        assert (error_RD <= limit_RD + torch.finfo(torch.float32).tiny).all(), payload


def test_what_is_not_finite_stays_so() -> None:
    """A bad step must be seen, whatever the payload."""
    for bad in (float("nan"), float("inf")):
        x_RD = torch.ones(1, 4)
        x_RD[0, 2] = bad
        for payload in ("bf16", "fp8"):
            assert not decode(encode(x_RD, payload), payload, 4, torch.float32).isfinite().all()


def there(rank: int, world: int, payload: Payload) -> tuple[np.ndarray, np.ndarray]:
    """What rank ``rank`` gets where rank r sends r + 1 rows of r to each; and the gradient of what it sent."""
    x_RD = torch.full((world * (rank + 1), 3), float(rank), requires_grad=True)
    route = Route([rank + 1] * world, [r + 1 for r in range(world)], dist.group.WORLD, payload, "bf16")
    out_RD = wait_rows(start_rows(x_RD, route))
    (out_RD * (rank + 2)).sum().backward()
    assert x_RD.grad is not None
    return out_RD.detach().numpy(), x_RD.grad.numpy()


@pytest.mark.parametrize("payload", ["exact", "fp8"])
def test_rows_go_to_their_ranks_and_gradients_come_back(payload: Payload) -> None:
    for rank, (got, gradient) in enumerate(run_ranks(3, there, payload)):
        np.testing.assert_allclose(got, np.repeat([0.0, 1.0, 2.0], [1, 2, 3])[:, None].repeat(3, 1), rtol=2**-4)
        np.testing.assert_allclose(gradient, np.repeat([2.0, 3.0, 4.0], rank + 1)[:, None].repeat(3, 1), rtol=2**-8)


def layer_of(mesh: Mesh, dispatch: str, payload: str = "exact", chunks: int = 1) -> MoELayer:
    factor = 1.0 if dispatch == "padded" else None
    config = tiny(
        dispatch=dispatch, dispatch__payload=payload, dispatch__chunks=chunks, capacity__factor_train=factor,
        capacity__minimum=2, model__dim=256, experts__num_shared=1,
    )  # fmt: skip
    return moe_layer(config, mesh)


def passed(layer: MoELayer, rank: int) -> dict[str, np.ndarray]:
    """Forward and backward: output and all gradients."""
    x_TD = torch.randn(TOKENS, 256, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    out = layer(x_TD, ids(x_TD, 2), Replay())
    (out.hidden_TD.square().sum() + out.losses.balance).backward()
    named = {"y": out.hidden_TD.detach(), "dx": x_TD.grad} | {n: p.grad for n, p in layer.named_parameters()}
    return {name: value.numpy() for name, value in named.items() if value is not None}


def variants(rank: int, world: int) -> dict[str, dict[str, np.ndarray]]:
    mesh, found = mesh_of_world(world, CPU), {}
    for dispatch in ("alltoall", "dedup", "padded"):
        for payload, chunks in (("exact", 1), ("exact", 3), ("exact", 40), ("bf16", 2), ("fp8", 1)):
            found[f"{dispatch} {payload} {chunks}"] = passed(layer_of(mesh, dispatch, payload, chunks), rank)
    return found


def test_chunks_change_nothing_and_payloads_little() -> None:
    for found in run_ranks(2, variants):
        for label, ours in found.items():
            dispatch, payload, _ = label.split()
            plain = found[f"{dispatch} exact 1"]
            limit = {"exact": 2e-6, "bf16": 1e-2, "fp8": 6e-2}[payload]
            assert ours.keys() == plain.keys()
            for name, value in plain.items():
                error = np.linalg.norm(ours[name] - value) / np.linalg.norm(value)
                assert error < limit, (label, name)
                assert payload == "exact" or name.startswith("shared") or error > 0, "rounded nowhere"


def sent(rank: int, world: int) -> list[int]:
    mesh, num_bytes = mesh_of_world(world, CPU), []
    for payload in ("exact", "bf16", "fp8"):
        layer = layer_of(mesh, "alltoall", payload)
        step = Contestant(payload, partial(passed, layer, rank), layer.zero_grad)
        num_bytes.append(bytes_sent(step, mesh))
    return num_bytes


def test_payloads_halve_the_bytes_and_fp8_takes_an_eighth_more_off() -> None:
    """Of four ways, one is the way out: 256 numbers in 4 bytes, 2, or 1 and two scales."""
    for exact, half, eight in run_ranks(2, sent):
        assert half == pytest.approx(exact / 2, rel=0.01)
        assert eight == pytest.approx(exact * (3 * 512 + 264) / 4096, rel=0.01)


class Work:
    """A work that says when it is waited for."""

    def __init__(self, inner: Any, name: str, log: list[str]) -> None:
        self.inner, self.name, self.log = inner, name, log

    def wait(self) -> None:
        self.log.append(f"wait {self.name}")
        self.inner.wait()


class Told(torch.autograd.Function):
    """The identity; says when it is passed, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, log: list[str], name: str) -> torch.Tensor:
        ctx.log, ctx.name = log, name
        log.append(name)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.log.append(f"{ctx.name} backward")
        return grads[0], None, None


def started_and_awaited(rank: int, world: int, dispatch: str) -> tuple[list[str], list[str]]:
    """All-to-alls of a layer in three chunks whose forward is computed again in backward."""
    layer, log, number = layer_of(mesh_of_world(world, CPU), dispatch, chunks=3), [], [0]
    plain = dist.all_to_all_single

    def told(*args: Any, **keys: Any) -> Any:
        number[0] += 1
        return Work(plain(*args, **keys), str(number[0]), log)

    dist.all_to_all_single = told
    x_TD = torch.randn(TOKENS, 256, requires_grad=True)
    out_TD = checkpoint(lambda x_TD: layer(x_TD, ids(x_TD, 2), Replay()).hidden_TD, x_TD, use_reentrant=False)
    out_TD.sum().backward()
    return [f"wait {i}" for i in range(1, number[0] + 1)], sorted(log, key=lambda line: int(line.split()[1]))


@pytest.mark.parametrize(("dispatch", "world"), [("dedup", 2), ("hierarchical", 4)])
def test_recompute_leaves_nothing_on_its_way(dispatch: str, world: int) -> None:
    """It stops in the experts of the last chunk, when the results of the others are on their way home."""
    for started, awaited in run_ranks(world, started_and_awaited, dispatch):
        assert len(started) > 2 * 3 * 4
        assert awaited == started


def alone_in_its_group(rank: int, world: int) -> bool:
    mesh = mesh_of_world(1, CPU)
    rounded, exact = (passed(layer_of(mesh, "dedup", payload), rank)["y"] for payload in ("fp8", "exact"))
    return bool((rounded == exact).all())


def test_what_goes_nowhere_is_not_rounded() -> None:
    assert run_ranks(2, alone_in_its_group) == [True, True]


def order_of_events(rank: int, world: int, chunks: int) -> tuple[list[str], list[str]]:
    """What happens in forward and in backward of a padded trip (no counts), starts and waits numbered as started."""
    layer, log, number = layer_of(mesh_of_world(world, CPU), "padded", chunks=chunks), [], [0]
    plain = dist.all_to_all_single

    def told(*args: Any, **keys: Any) -> Any:
        name = str(number[0])
        number[0] += 1
        log.append(f"start {name}")
        return Work(plain(*args, **keys), name, log)

    dist.all_to_all_single = told
    x_TD, works = torch.randn(TOKENS, 256, requires_grad=True), [0]

    def work(given: Dispatched) -> torch.Tensor:
        works[0] += 1
        return Told.apply(given.x_CD, log, f"experts {works[0] - 1}")

    placement = layer.capacity(layer.router(seen(x_TD), Replay()), 1, Replay())
    departure = set_out(layer.dispatcher, x_TD, placement)
    done = travel(departure, work, lambda: Told.apply(x_TD, log, "aside"))
    forward = list(log)
    log.clear()
    number[0] = 0
    assert done.aside is not None
    (layer.dispatcher.join(done.home).sum() + done.aside.sum()).backward()
    return forward, log


def test_what_travels_is_waited_for_after_the_work_beside_it() -> None:
    """In forward the next part and the last results, in backward their gradients."""
    forward, backward = run_ranks(2, order_of_events, 2)[0]
    assert forward == [
        *("start 0", "aside", "start 1", "wait 0", "experts 0"),
        *("start 2", "wait 1", "experts 1", "start 3", "wait 2", "wait 3"),
    ]
    assert backward == [
        *("start 0", "start 1", "wait 0", "experts 1 backward"),
        *("start 2", "wait 1", "experts 0 backward", "start 3", "wait 2", "aside backward", "wait 3"),
    ]
