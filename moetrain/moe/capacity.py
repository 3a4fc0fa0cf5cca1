"""Capacity: how many slots an expert has, who gets them, and who is dropped (the residual carries what is dropped)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from moetrain.config import CapacityConfig
from moetrain.moe.replay import Replay
from moetrain.ops.slots import (
    best_tokens_first,
    choice_major,
    count_by_choice,
    largest_first,
    queue_positions,
    token_major,
)
from moetrain.parallel.collectives import gather_equal
from moetrain.parallel.mesh import Mesh
from moetrain.types import Placement, Routing


def slots_per_expert(num_tokens: int, top_k: float, num_experts: int, factor: float, minimum: int) -> int:
    """``max(even(floor(k * factor * T / E)), minimum)``: rounded down, then up to an even number."""
    slots = math.floor(top_k * factor * num_tokens / num_experts)
    return max(slots + slots % 2, minimum)


def renormalised(routing: Routing, kept_TK: Tensor) -> Routing:
    """Each token's weights over what was kept, scaled to the sum that they had before; 0 where nothing was kept."""
    valid_TK = torch.ones_like(kept_TK) if routing.valid_TK is None else routing.valid_TK
    kept_weight_TK = routing.weight_TK * kept_TK
    before_T1 = (routing.weight_TK * valid_TK).sum(1, keepdim=True)
    kept_T1 = kept_weight_TK.sum(1, keepdim=True)
    nothing_T1 = kept_T1 == 0
    scale_T1 = before_T1.masked_fill(nothing_T1, 0.0) / kept_T1.masked_fill(nothing_T1, 1.0)
    return replace(routing, weight_TK=kept_weight_TK * scale_T1)


class Capacity(nn.Module):
    """Places assignments in slots in the order of ``priority``, and drops what exceeds the capacity.

    Only ``token_major`` is causal (for k = 1 also ``choice_major``, which is the same then): under the other orders a
    later token can take the slot of an earlier one. ``random`` draws an order in training and is choice-major in
    evaluation. The ``probs`` of an expert are the combine weights, those of ``batch_prioritised`` the best router
    probability among a token's experts; ties go to the earlier token.

    scope ``global``: the queue that one process would have made of the whole micro-step, ranks in their order.
    ``choice_major`` and ``token_major`` need a small exchange of counts for it, the others gather every assignment.
    ``sequence``: each sequence has ``slots`` of its own, numbered on from those of the sequence before it, so that the
    capacity of the micro-batch is the sum.

    ``factor_train`` may be set between steps, on all ranks alike.
    """

    def __init__(self, config: CapacityConfig, num_experts: int, experts_per_token: float, mesh: Mesh) -> None:
        super().__init__()
        self.config, self.num_experts, self.mesh = config, num_experts, mesh
        self.experts_per_token, self.factor_train = experts_per_token, config.factor_train

    def forward(self, routing: Routing, num_sequences: int, replay: Replay) -> Placement:
        """Routing of T tokens of ``num_sequences`` equally long sequences -> the same with a slot for each
        assignment.
        """
        num_tokens = routing.expert_TK.shape[0]
        slots = self._slots(num_tokens, num_sequences)
        slot_TK = replay.once("slot", lambda: self._positions(routing, num_sequences, dropless=slots is None))
        valid_TK = torch.ones_like(slot_TK, dtype=torch.bool) if routing.valid_TK is None else routing.valid_TK
        if slots is None:
            return Placement(routing, valid_TK, slot_TK, None)
        kept_TK = (slot_TK < slots) & valid_TK
        if self.config.renormalise:
            routing = renormalised(routing, kept_TK)
        if self.config.scope == "sequence":
            slot_TK = slot_TK + slots * sequence_of(slot_TK, num_sequences).unsqueeze(1)
            slots *= num_sequences
        return Placement(routing, kept_TK, slot_TK, slots)

    def _slots(self, num_tokens: int, num_sequences: int) -> int | None:
        config = self.config
        fixed = config.slots_train if self.training else config.slots_eval
        factor = self.factor_train if self.training else config.factor_eval
        if factor is None or fixed is not None:
            return fixed
        counted = {
            "rank": num_tokens,
            "global": num_tokens * self.mesh.world_size,
            "sequence": num_tokens // num_sequences,
        }
        return slots_per_expert(counted[config.scope], self.experts_per_token, self.num_experts, factor, config.minimum)

    @torch.no_grad()
    def _positions(self, routing: Routing, num_sequences: int, dropless: bool) -> Tensor:
        """Positions in the queues, int64 [T, K]; what is no assignment stands in a queue of its own."""
        priority, scope = self.config.priority, self.config.scope
        if dropless:
            priority, scope = "choice_major", "rank"
        if priority == "random" and not self.training:
            priority = "choice_major"
        expert_TK, num_queues = routing.expert_TK, self.num_experts
        if scope == "sequence":
            expert_TK = expert_TK + num_queues * sequence_of(expert_TK, num_sequences).unsqueeze(1)
            num_queues *= num_sequences
        if routing.valid_TK is not None:
            expert_TK = expert_TK.masked_fill(~routing.valid_TK, num_queues)
        if priority in ("choice_major", "token_major"):
            order_N = choice_major(expert_TK) if priority == "choice_major" else token_major(expert_TK)
            slot_TK = queue_positions(expert_TK, num_queues + 1, order_N)
            return slot_TK if scope != "global" else slot_TK + self._before_me(routing, priority)
        if scope != "global":
            return queue_positions(expert_TK, num_queues + 1, _by_score(_scores(routing, priority), priority))
        whole_TK, score_TK = (self._of_all_ranks(x) for x in (expert_TK, _scores(routing, priority)))
        slot_TK = queue_positions(whole_TK, num_queues + 1, _by_score(score_TK, priority))
        return slot_TK.view(self.mesh.world_size, *expert_TK.shape)[self.mesh.rank]

    def _of_all_ranks(self, mine_TK: Tensor) -> Tensor:
        return gather_equal(mine_TK, self.mesh.world_group).flatten(0, 1)

    def _before_me(self, routing: Routing, priority: str) -> Tensor:
        """How far the other ranks push back each assignment's place in the queue, int64 [T, K]."""
        counts_KE = count_by_choice(routing.expert_TK, self.num_experts, routing.valid_TK)
        if priority == "token_major":
            counts_KE = counts_KE.sum(0, keepdim=True).expand_as(counts_KE).contiguous()
        counts_WKE = gather_equal(counts_KE, self.mesh.world_group)
        offset_KE = counts_WKE[: self.mesh.rank].sum(0)
        if priority == "choice_major":
            earlier_choices_KE = counts_WKE.sum(0).cumsum(0) - counts_WKE.sum(0)
            offset_KE = offset_KE + earlier_choices_KE - (counts_KE.cumsum(0) - counts_KE)
        return offset_KE.t().gather(0, routing.expert_TK)


def sequence_of(given_TK: Tensor, num_sequences: int) -> Tensor:
    """Which of equally long sequences each token is of, int64 [T]."""
    num_tokens = given_TK.shape[0]
    return torch.arange(num_tokens, device=given_TK.device) // max(num_tokens // num_sequences, 1)


def _scores(routing: Routing, priority: str) -> Tensor:
    """What an order goes by, fp32 [T, K], the larger the earlier; -inf for what is no assignment."""
    if priority == "random":
        score_TK = torch.rand_like(routing.weight_TK)
    elif priority == "probs":
        score_TK = routing.weight_TK
    else:
        score_TK = routing.probs_TE.gather(1, routing.expert_TK)
    return score_TK if routing.valid_TK is None else score_TK.masked_fill(~routing.valid_TK, -torch.inf)


def _by_score(score_TK: Tensor, priority: str) -> Tensor:
    """The order of service, int64 [N]."""
    if priority == "batch_prioritised":
        return best_tokens_first(score_TK.amax(1), score_TK.shape[1])
    return largest_first(score_TK)
