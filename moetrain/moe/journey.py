"""Round trips to experts, interleaved: whatever can be computed is computed while something else travels."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from moetrain.moe.dispatch.base import Departure, Dispatcher, Trip
from moetrain.types import Dispatched, Placement

Beside = TypeVar("Beside")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Travelled(Generic[Beside]):
    """home: what came home of each part. arrived: what other ranks and this one sent here, of each part. aside: what
    was computed meanwhile.
    """

    home: list[Tensor]
    arrived: list[Dispatched]
    aside: Beside


def set_out(dispatcher: Dispatcher, x_TD: Tensor, placement: Placement) -> Departure:
    """Of x_TD, with its counts on their way."""
    departure = dispatcher.depart(x_TD, placement)
    next(departure)
    return departure


def travel(
    departure: Departure, experts: Callable[[Dispatched], Tensor], aside: Callable[[], Beside]
) -> Travelled[Beside]:
    """The trips of all parts to their end.

    ``aside`` is done while the first tokens travel. While experts work on one part, the next one and the results of the
    last are on their way, and in backward their gradients.
    """
    trips = _end(departure)
    next(trips[0])
    beside, arrived = aside(), list[Dispatched]()
    try:
        for number, trip in enumerate(trips):
            if number + 1 < len(trips):
                next(trips[number + 1])
            sent = next(trip)
            assert sent is not None
            trip.send(experts(sent))
            arrived.append(sent)
    except Exception:
        _land(trips[: len(arrived)])
        raise
    return Travelled([_end(trip) for trip in trips], arrived, beside)


@torch.no_grad()
def _land(trips: Sequence[Trip]) -> None:
    """Wait for results that nobody needs: activation recompute stops, in the last part, where the last tensor that
    backward needs is there again, and buffers must not go while something is on its way to them. Of any other exception
    this process dies.
    """
    for trip in trips:
        _end(trip)


def _end(last: Generator[Any, Any, Result]) -> Result:
    """What is returned after the last stop."""
    try:
        next(last)
    except StopIteration as stop:
        result: Result = stop.value
        return result
    raise AssertionError("a dispatcher stops where moe.dispatch.base says, and nowhere else")
