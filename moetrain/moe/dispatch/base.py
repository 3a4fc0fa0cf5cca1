"""The contract of a dispatcher: tokens out to the experts' ranks, results home; it owns the whole round trip."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from moetrain.ops.permute import RowMap, rows_of_tokens
from moetrain.ops.timeline import Phase, Timeline
from moetrain.parallel.collectives import all_to_all_rows
from moetrain.parallel.mesh import Mesh
from moetrain.types import Dispatched, Placement, Routing


class Dispatcher(nn.Module, ABC):
    """Experts are contiguous: rank g of an EP group holds experts g*e ... (g+1)*e - 1."""

    def __init__(self, *, num_experts: int, mesh: Mesh, timeline: Timeline) -> None:
        super().__init__()
        assert num_experts % mesh.ep_size == 0, (num_experts, mesh.ep_size)
        self.num_experts, self.mesh, self.timeline = num_experts, mesh, timeline
        self.num_local = num_experts // mesh.ep_size

    @abstractmethod
    def forward(self, x_TD: Tensor, placement: Placement) -> Dispatched:
        """Every kept assignment's token as a row at its expert, rows grouped by local expert."""

    @abstractmethod
    def combine(self, y_RD: Tensor, sent: Dispatched) -> Tensor:
        """The experts' rows, in the order they came -> weighted sums [T, D] on the tokens' own rank."""

    def exchange(self, x_RD: Tensor, send: list[int] | None, receive: list[int] | None, phase: Phase) -> Tensor:
        """The all-to-all of rows over the EP group, its time told apart from ``phase``, which it interrupts."""
        x_RD = self.timeline.through(x_RD, phase, "exchange")
        x_RD = all_to_all_rows(x_RD, send, receive, self.mesh.ep_group)
        return self.timeline.through(x_RD, "exchange", phase)


def with_input_weights(x_TD: Tensor, routing: Routing, rows: RowMap) -> Tensor:
    """The rows for the experts, [R, D]: tokens, times their weights where those are on the input."""
    rows_RD = rows_of_tokens(x_TD, rows)
    if routing.weight_on == "output":
        return rows_RD
    weight_N = routing.weight_TK.reshape(-1)
    weight_R = torch.cat([weight_N, weight_N.new_zeros(1)])[rows.assignment_R]
    return (rows_RD * weight_R.unsqueeze(1)).to(x_TD.dtype)


def output_weights(routing: Routing) -> Tensor:
    """What multiplies the experts' results, fp32 [T, K]."""
    return routing.weight_TK if routing.weight_on == "output" else torch.ones_like(routing.weight_TK)
