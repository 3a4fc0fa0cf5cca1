"""Capacity: how many slots an expert has, who gets them, and who is dropped (the residual carries what is dropped)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moetrain.config import CapacityConfig
from moetrain.moe.replay import Replay
from moetrain.ops.slots import count_by_choice, queue_positions
from moetrain.parallel.collectives import gather_equal
from moetrain.parallel.mesh import Mesh
from moetrain.types import Placement, Routing


def slots_per_expert(num_tokens: int, top_k: float, num_experts: int, factor: float, minimum: int) -> int:
    """``max(even(floor(k * factor * T / E)), minimum)``: rounded down, then up to an even number."""
    slots = math.floor(top_k * factor * num_tokens / num_experts)
    return max(slots + slots % 2, minimum)


class Capacity(nn.Module):
    """Places assignments in slots, all first choices before all second choices, and drops what exceeds the capacity.

    The order is not causal: a later token's first choice can take the slot of an earlier token's second choice.
    Under ``global`` scope the queue of an expert runs over the ranks in their order within each choice, which is the
    queue that one process would have made of the whole micro-step.
    """

    def __init__(self, config: CapacityConfig, num_experts: int, experts_per_token: float, mesh: Mesh) -> None:
        super().__init__()
        self.config, self.num_experts, self.mesh = config, num_experts, mesh
        self.experts_per_token = experts_per_token

    def forward(self, routing: Routing, num_sequences: int, replay: Replay) -> Placement:
        """Routing of T tokens of ``num_sequences`` equally long sequences -> the same with a slot for each
        assignment.
        """
        factor = self.config.factor_train if self.training else self.config.factor_eval
        slot_TK = queue_positions(routing.expert_TK, self.num_experts)
        if factor is None:
            return Placement(routing, torch.ones_like(routing.expert_TK, dtype=torch.bool), slot_TK, None)
        num_tokens = routing.expert_TK.shape[0]
        if self.config.scope == "global":
            slot_TK = slot_TK + self._before_me(routing.expert_TK)
            num_tokens *= self.mesh.world_size
        slots = slots_per_expert(num_tokens, self.experts_per_token, self.num_experts, factor, self.config.minimum)
        return Placement(routing, slot_TK < slots, slot_TK, slots)

    def _before_me(self, expert_TK: Tensor) -> Tensor:
        """How far the other ranks push back each assignment's place in the queue, int64 [T, K]."""
        counts_WKE = gather_equal(count_by_choice(expert_TK, self.num_experts), self.mesh.world_group)
        earlier_choices_KE = counts_WKE.sum(0).cumsum(0) - counts_WKE.sum(0)
        mine_KE = counts_WKE[self.mesh.rank]
        already_mine_KE = mine_KE.cumsum(0) - mine_KE
        earlier_ranks_KE = counts_WKE[: self.mesh.rank].sum(0)
        offset_KE = earlier_choices_KE - already_mine_KE + earlier_ranks_KE
        return offset_KE.t().gather(0, expert_TK)
