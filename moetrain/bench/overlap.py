"""How much of the exchange hides behind experts: they sleep, so that nothing but the order of things decides.

With products in the experts' place two cores would say little: what copies rows between ranks is work for them too.
"""

from __future__ import annotations

from dataclasses import replace
from time import sleep
from typing import Any

import torch
from torch import Tensor, nn

from moetrain.bench.race import Contestant, median_and_least, most_of, race
from moetrain.config import Config
from moetrain.moe.layer import MoELayer
from moetrain.moe.replay import Replay
from moetrain.ops.kernels import make_kernels
from moetrain.ops.timeline import Timeline
from moetrain.parallel.mesh import Mesh
from moetrain.types import Dispatched

CHUNKS = (1, 2, 4, 8)


class _Sleep(torch.autograd.Function):
    """The identity, which takes ``seconds`` forward and as long backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        sleep(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        sleep(ctx.seconds)
        return grads[0], None


class _Sleeper(nn.Module):
    """In the place of routed or shared experts: sleeps ``seconds_per_row`` for each row of what it is given."""

    def __init__(self, seconds_per_row: float) -> None:
        super().__init__()
        self.seconds_per_row, self.num_rows = seconds_per_row, 0

    def forward(self, given: Dispatched | Tensor) -> Tensor:
        x_RD = given if isinstance(given, Tensor) else given.x_CD
        self.num_rows = x_RD.shape[0]
        out: Tensor = _Sleep.apply(x_RD, self.seconds_per_row * x_RD.shape[0])
        return out

    def join(self, routed_TD: Tensor, shared_TD: Tensor) -> Tensor:
        return routed_TD + shared_TD


def bench_overlap(config: Config, mesh: Mesh, rounds: int) -> str | None:
    """First the exchange alone; then with experts, or a shared expert, that sleep as long as it took. Collective."""
    alone, experts = _contestant(config, mesh, "exchange", 1, 0.0)
    exchange = median_and_least(race([alone], mesh, rounds)["exchange"], "wall")[0]
    exchange, num_rows = most_of(exchange, mesh), experts.num_rows
    num_tokens = config.train.micro_batch * config.model.context
    field = [_contestant(config, mesh, f"{n} chunks", n, exchange / 2 / num_rows)[0] for n in CHUNKS]
    field.append(_contestant(config, mesh, "shared", 1, 0.0, exchange / 2 / num_tokens)[0])
    samples = race([alone, *field], mesh, rounds)
    if not mesh.is_main:
        return None
    medians = {name: median_and_least(of, "wall")[0] for name, of in samples.items()}
    return _text(medians, exchange, mesh)


def _contestant(
    config: Config, mesh: Mesh, name: str, chunks: int, per_row: float, per_token: float | None = None
) -> tuple[Contestant, _Sleeper]:
    """A layer forward and backward; per_row, per_token: seconds that experts and a shared expert sleep."""
    config = replace(config, dispatch={**config.dispatch, "chunks": chunks})
    layer = MoELayer(config, mesh, Timeline(mesh.device, enabled=False), make_kernels(mesh.device, "torch"), 2, 0)
    nn.init.normal_(layer.router.get_parameter("gate"))
    layer.experts = experts = _Sleeper(per_row)
    layer.shared = None if per_token is None else _Sleeper(per_token)
    shape = config.train.micro_batch * config.model.context, config.model.dim
    x_TD = torch.randn(shape, device=mesh.device, generator=torch.Generator(mesh.device).manual_seed(mesh.rank))
    x_TD.requires_grad_()
    tokens_BS = torch.zeros(1, shape[0], dtype=torch.int64, device=mesh.device)

    def step() -> Tensor:
        out_TD = layer(x_TD, tokens_BS, Replay()).hidden_TD
        out_TD.backward(torch.ones_like(out_TD))
        return out_TD.detach()

    def clear() -> None:
        x_TD.grad = None

    return Contestant(name, step, clear), experts


def _text(medians: dict[str, float], slept: float, mesh: Mesh) -> str:
    """Milliseconds of wall clock, forward and backward."""
    longer = max(medians["exchange"], slept)
    rows = [
        f"{mesh.world_size} ranks; forward and backward, ms of wall clock, medians",
        f"exchange alone {1e3 * medians['exchange']:.0f}; experts sleep {1e3 * slept:.0f}, half of it in backward",
    ]
    for chunks in CHUNKS:
        layer, bound = medians[f"{chunks} chunks"], longer * (1.1 + 1 / chunks)
        rows.append(f"{chunks} chunks{1e3 * layer:9.0f}, of {1e3 * bound:.0f} = 1.1 times the longer, and one chunk")
    hidden = medians["exchange"] + slept - medians["shared"]
    rows.append(f"a shared expert that sleeps as long: {1e3 * medians['shared']:.0f}, {1e3 * hidden:.0f} of it hidden")
    return "\n".join(rows)
