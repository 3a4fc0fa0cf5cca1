"""The contract of a dispatcher: tokens out to the experts' ranks, results home; it owns the whole round trip.

What would have to wait is a generator, so that somebody else can work there. A layer departs once::

    yield                     counts of all parts are on their way
    return trips              they are known (the one place where the host may wait for the device)

and each part of its tokens makes its round trip::

    yield                     its tokens are on their way
    sums_CD = yield Dispatched(...)     experts are to work
    yield                     their results are on their way home
    return out_TD
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from moetrain.ops.permute import rows_of_tokens, weights_of_rows
from moetrain.ops.timeline import Phase, Timeline
from moetrain.parallel.exchange import Flight, Route, start_rows, wait_rows
from moetrain.parallel.mesh import Mesh
from moetrain.parallel.wire import Payload
from moetrain.types import Dispatched, Placement, Routing, RowMap

Trip: TypeAlias = Generator[Dispatched | None, Tensor | None, Tensor]
Departure: TypeAlias = Generator[None, None, list[Trip]]


class Dispatcher(ABC):
    """Experts are contiguous: rank g of an EP group holds experts g*e ... (g+1)*e - 1."""

    def __init__(self, *, num_experts: int, mesh: Mesh, timeline: Timeline) -> None:
        assert num_experts % mesh.ep_size == 0, (num_experts, mesh.ep_size)
        self.num_experts, self.mesh, self.timeline = num_experts, mesh, timeline
        self.num_local = num_experts // mesh.ep_size

    @abstractmethod
    def depart(self, x_TD: Tensor, placement: Placement) -> Departure:
        """Every kept assignment's token to its expert, and weighted sums [T, D] home; sums are sent in as [C, D].

        Parts travel apart, so that one is on its way while another is computed; there are as many on every rank.
        """

    def join(self, parts: list[Tensor]) -> Tensor:
        """What came home of those parts, as [T, D]."""
        return parts[0]


class Sharded(Dispatcher):
    """Over the EP group. payload: how rows look on their way to the experts, unless there is no way to go; under
    ``fp8`` what comes back and gradients are bf16. chunks: parts of the tokens that travel one after the other.
    """

    def __init__(
        self, *, num_experts: int, mesh: Mesh, timeline: Timeline, payload: Payload = "exact", chunks: int = 1
    ) -> None:
        super().__init__(num_experts=num_experts, mesh=mesh, timeline=timeline)
        assert chunks >= 1, "rules.layout lets nobody ask for less"
        self.payload: Payload = payload if mesh.ep_size > 1 else "exact"
        self.chunks = chunks

    def split(self, x_TD: Tensor, placement: Placement) -> list[tuple[Tensor, Placement]]:
        """Parts of the tokens, ``chunks`` of them."""
        if self.chunks == 1:
            return [(x_TD, placement)]
        sizes = [part.stop - part.start for part in parts(x_TD.shape[0], self.chunks)]
        return list(zip(x_TD.split(sizes), _of_tokens(placement, sizes), strict=True))

    def join(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def route(self, send: list[int] | None, receive: list[int] | None) -> Route:
        """The way out to experts, under ``payload``."""
        back: Payload = "exact" if self.payload == "exact" else "bf16"
        return Route(send, receive, self.mesh.ep_group, self.payload, back)

    def home(self, send: list[int] | None, receive: list[int] | None) -> Route:
        """The way home from experts. send, receive: as on the way out."""
        way: Payload = "exact" if self.payload == "exact" else "bf16"
        return Route(receive, send, self.mesh.ep_group, way, way)

    def start(self, x_RD: Tensor, route: Route, phase: Phase) -> Flight:
        """The all-to-all of rows, its time told apart from ``phase``, which it interrupts."""
        flight = start_rows(self.timeline.through(x_RD, phase, "exchange"), route)
        return replace(flight, token_RD=self.timeline.through(flight.token_RD, "exchange", phase))

    def land(self, flight: Flight, phase: Phase) -> Tensor:
        """Wait for the rows; the time that passes meanwhile belongs to the exchange."""
        flight = replace(flight, token_RD=self.timeline.through(flight.token_RD, phase, "exchange"))
        return self.timeline.through(wait_rows(flight), "exchange", phase)


def parts(total: int, number: int) -> list[slice]:
    """``total`` things in ``number`` parts as equal as can be."""
    return [slice(total * i // number, total * (i + 1) // number) for i in range(number)]


def _of_tokens(placement: Placement, sizes: list[int]) -> list[Placement]:
    """What the placement says of so many tokens, and of so many after them."""
    routing = placement.routing
    tensors = routing.expert_TK, routing.weight_TK, placement.kept_TK, placement.slot_TK
    return [
        replace(placement, routing=replace(routing, expert_TK=expert, weight_TK=weight), kept_TK=kept, slot_TK=slot)
        for expert, weight, kept, slot in zip(*(tensor.split(sizes) for tensor in tensors), strict=True)
    ]


def with_input_weights(x_TD: Tensor, routing: Routing, rows: RowMap) -> Tensor:
    """The rows for the experts, [R, D]: tokens, times their weights where those are on the input."""
    rows_RD = rows_of_tokens(x_TD, rows)
    if routing.weight_on == "output":
        return rows_RD
    return (rows_RD * weights_of_rows(routing.weight_TK, rows).unsqueeze(1)).to(x_TD.dtype)


def output_weights(routing: Routing) -> Tensor | None:
    """What multiplies the experts' results, fp32 [T, K]; None: nothing."""
    return routing.weight_TK if routing.weight_on == "output" else None
