"""Round trips to experts, interleaved: whatever can be computed is computed while something else travels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from moetrain.moe.dispatch.base import Dispatcher, Trip
from moetrain.types import Dispatched, Placement

Beside = TypeVar("Beside")


@dataclass(frozen=True)
class Travelled(Generic[Beside]):
    """home: what came home of each part. arrived: what other ranks and this one sent here, of each part. aside: what
    was computed meanwhile.
    """

    home: list[Tensor]
    arrived: list[Dispatched]
    aside: Beside


def set_out(dispatcher: Dispatcher, x_TD: Tensor, placement: Placement) -> list[Trip]:
    """The trips of the parts that the dispatcher makes of x_TD, their counts on their way."""
    trips = [dispatcher.trip(*part) for part in dispatcher.split(x_TD, placement)]
    for trip in trips:
        next(trip)
    return trips


def travel(
    trips: Sequence[Trip], experts: Callable[[Dispatched], Tensor], aside: Callable[[], Beside]
) -> Travelled[Beside]:
    """All trips to their end.

    ``aside`` is done while the first tokens travel. While experts work on one part, the next one and the results of the
    last are on their way, and in backward their gradients.
    """
    for trip in trips:
        next(trip)
    next(trips[0])
    beside, arrived = aside(), list[Dispatched]()
    try:
        for number, trip in enumerate(trips):
            if number + 1 < len(trips):
                next(trips[number + 1])
            sent = _arrival(trip)
            trip.send(experts(sent))
            arrived.append(sent)
    except Exception:
        _land(trips[: len(arrived)])
        raise
    return Travelled([_end(trip) for trip in trips], arrived, beside)


@torch.no_grad()
def _land(trips: Sequence[Trip]) -> None:
    """Wait for results that nobody needs: activation recompute stops where the last tensor that backward needs is there
    again, and buffers must not go while something is on its way to them.
    """
    for trip in trips:
        _end(trip)


def _arrival(trip: Trip) -> Dispatched:
    while (sent := next(trip)) is None:
        pass
    return sent


def _end(trip: Trip) -> Tensor:
    while True:
        try:
            next(trip)
        except StopIteration as home:
            out_TD: Tensor = home.value
            return out_TD
