"""Rows to their ranks without waiting for them: started here, waited for there, in forward and in backward alike.

Autograd runs nodes in the opposite order of their making. So what was started before some work and waited for after it
has its gradient started before the backward of that work, and waited for after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.parallel.wire import Payload, decode, encode, width


@dataclass(frozen=True)
class Route:
    """send[r] rows go to rank r of the group, receive[r] come from it; None: equal blocks. ``there`` is how rows look
    on their way, ``back`` how their gradients do. A group of None means one process: nothing is sent.
    """

    send: list[int] | None
    receive: list[int] | None
    group: ProcessGroup | None
    there: Payload = "exact"
    back: Payload = "exact"

    def back_home(self) -> Route:
        """The way of the gradients, and of results."""
        return Route(self.receive, self.send, self.group, self.back, self.there)


class _Line:
    """What is on its way: at most one all-to-all at a time, out or back."""

    def __init__(self) -> None:
        self._work: Any = None
        self._sent = self._arriving = torch.empty(0)

    def launch(self, x_RD: Tensor, route: Route) -> int:
        """Start it; returns the number of rows that come in."""
        num_rows = x_RD.shape[0] if route.receive is None else sum(route.receive)
        columns, dtype = width(route.there, x_RD.shape[1], x_RD.dtype)
        self._sent = encode(x_RD, route.there).contiguous()
        self._arriving = self._sent.new_empty(num_rows, columns, dtype=dtype)
        self._work = dist.all_to_all_single(
            self._arriving, self._sent, route.receive, route.send, group=route.group, async_op=True
        )
        return num_rows

    def land(self, route: Route, dim: int, dtype: torch.dtype) -> Tensor:
        """Wait for what was launched along ``route``."""
        assert self._work is not None, "nothing is on its way: it has landed already"
        self._work.wait()
        out_RD = decode(self._arriving, route.there, dim, dtype)
        self._work, self._sent, self._arriving = None, torch.empty(0), torch.empty(0)
        return out_RD


@dataclass(frozen=True)
class Flight:
    """Rows on their way. token_RD: no numbers yet, it stands in the autograd graph for those that will arrive."""

    token_RD: Tensor
    line: _Line
    route: Route


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, line: _Line, route: Route) -> Tensor:
        ctx.line, ctx.route, ctx.like = line, route, (x_RD.shape[1], x_RD.dtype)
        return x_RD.new_zeros(()).expand(line.launch(x_RD, route), x_RD.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.line.land(ctx.route.back_home(), *ctx.like), None, None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token_RD: Tensor, line: _Line, route: Route) -> Tensor:
        ctx.line, ctx.route = line, route
        return line.land(route, token_RD.shape[1], token_RD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.line.launch(grads[0], ctx.route.back_home())
        return grads[0].new_zeros(()).expand_as(grads[0]), None, None  # what arrives is in the line


def start_rows(x_RD: Tensor, route: Route) -> Flight:
    """Start the all-to-all of the rows of x_RD. Every rank of the group takes part in forward and in backward, also
    with zero rows.
    """
    line = _Line()
    token_RD: Tensor = x_RD if route.group is None else _Start.apply(x_RD, line, route)
    return Flight(token_RD, line, route)


def wait_rows(flight: Flight) -> Tensor:
    """What has arrived, [R, D]. Differentiable; once for each flight."""
    if flight.route.group is None:
        return flight.token_RD
    out: Tensor = _Wait.apply(flight.token_RD, flight.line, flight.route)
    return out


def all_to_all_rows(x_RD: Tensor, route: Route) -> Tensor:
    """There and then."""
    return wait_rows(start_rows(x_RD, route))


@dataclass(frozen=True)
class CountsInFlight:
    """Numbers on their way; no gradient."""

    arriving: Tensor
    work: Any

    def wait(self) -> Tensor:
        """What has arrived: on an accelerator in its stream's order, without the host."""
        if self.work is not None:
            self.work.wait()
        return self.arriving


def start_counts(counts: Tensor, group: ProcessGroup | None) -> CountsInFlight:
    """counts int64 [G, ...], block g for rank g of the group -> [G, ...], block g from rank g."""
    if group is None:
        return CountsInFlight(counts, None)
    counts = counts.contiguous()
    arriving = torch.empty_like(counts)
    work = dist.all_to_all_single(arriving, counts, group=group, async_op=True)
    return CountsInFlight(arriving, work)
