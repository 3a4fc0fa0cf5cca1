"""SparseMixer-v2: two experts sampled one after the other, with a gradient for the sampling (Liu et al. 2024, GRIN)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moetrain.moe.noise import gumbel_like
from moetrain.moe.replay import Replay
from moetrain.moe.routers.gated import GatedRouter
from moetrain.moe.routers.scoring import best_experts
from moetrain.types import Problem, RouterInput, RouterSite, RouterTraits, Routing


@dataclass(frozen=True)
class Picked:
    """What a round chose: expert_T1, int64, and weight_T1, fp32, differentiable."""

    expert_T1: Tensor
    weight_T1: Tensor


class SparseMixerRouter(GatedRouter):
    """Two rounds. Each leaves out the experts j with ``(best - l_j) / max(|l_j|, best) > 2 * epsilon`` and draws one of
    the rest by their softmax (the best one in evaluation); the second round goes without the first one's expert.

    The weight is that softmax at the expert, so that the two weights sum to anything up to 2; they are not normalised.
    In training a draw that is not the best one has, like the best, all of it in one case out of four, and a third of it
    in the other three: Heun's third-order rule. Its gradient goes by the whole, ``weight * (onehot - softmax)`` times
    the gradient of the output. This is what Phi-3.5-MoE's published code computes; the paper has ``|l_j| + |best|``.
    """

    def __init__(self, *, site: RouterSite, epsilon: float = 0.01) -> None:
        super().__init__(site)
        self.epsilon = epsilon

    @staticmethod
    def traits(**_: Any) -> RouterTraits:
        return RouterTraits(experts_per_token=2, noise="sampling", per_expert=("gate",))

    @staticmethod
    def problems(*, num_experts: int, epsilon: float) -> list[Problem]:
        problems = []
        if num_experts < 2:
            reason = "the router picks two different experts"
            problems.append(Problem("experts.num_experts", num_experts, reason, "set experts.num_experts=2 or more"))
        if epsilon < 0:
            reason = "even the best expert would be left out"
            problems.append(Problem("router.epsilon", epsilon, reason, "set router.epsilon=0.01"))
        return problems

    def forward(self, given: RouterInput, replay: Replay) -> Routing:
        logits_TE = self.logits(given.x_TD)
        first = self._round("first", logits_TE, torch.ones_like(logits_TE, dtype=torch.bool), replay)
        others_TE = torch.ones_like(logits_TE, dtype=torch.bool).scatter(1, first.expert_T1, False)
        second = self._round("second", logits_TE, others_TE, replay)
        expert_TK = torch.cat([first.expert_T1, second.expert_T1], dim=1)
        weight_TK = torch.cat([first.weight_T1, second.weight_T1], dim=1)
        return Routing(logits_TE, logits_TE.softmax(-1), expert_TK, weight_TK)

    def _round(self, name: str, logits_TE: Tensor, open_TE: Tensor, replay: Replay) -> Picked:
        near_TE = replay.once(f"{name}.near", lambda: near_the_best(logits_TE.detach(), open_TE, self.epsilon))
        near_logits_TE = logits_TE.masked_fill(~near_TE, float("-inf"))
        prob_TE = near_logits_TE.softmax(-1)
        if not self.training:
            expert_T1 = replay.once(name, lambda: best_experts(near_logits_TE, 1))
            return Picked(expert_T1, prob_TE.gather(1, expert_T1))
        expert_T1 = replay.once(name, lambda: _sample(near_logits_TE.detach(), near_TE))
        whole_T1 = replay.once(f"{name}.whole", lambda: _counts_whole(near_logits_TE, expert_T1))
        prob_T1 = prob_TE.gather(1, expert_T1)
        share_T1 = torch.where(whole_T1, 1.0, 1.0 / 3.0)
        # The share is on the value alone: what reaches prob_T1 in backward is the gradient of the output, unscaled.
        return Picked(expert_T1, prob_T1 + (share_T1 - 1.0) * prob_T1.detach())


def near_the_best(logits_TE: Tensor, open_TE: Tensor, epsilon: float) -> Tensor:
    """The open experts whose logits are not too far below the best open one, bool [T, E]; at least one a token."""
    best_T1 = logits_TE.masked_fill(~open_TE, float("-inf")).amax(-1, keepdim=True)
    return open_TE & (best_T1 - logits_TE <= 2 * epsilon * torch.maximum(logits_TE.abs(), best_T1))


def _sample(near_logits_TE: Tensor, near_TE: Tensor) -> Tensor:
    """A draw from the softmax, by Gumbel noise, int64 [T, 1]."""
    return best_experts((near_logits_TE + gumbel_like(near_logits_TE)).masked_fill(~near_TE, float("-inf")), 1)


def _counts_whole(near_logits_TE: Tensor, expert_T1: Tensor) -> Tensor:
    """Heun's choice, bool [T, 1]."""
    is_best_T1 = expert_T1 == best_experts(near_logits_TE, 1)
    return is_best_T1 | (torch.rand_like(near_logits_TE[:, :1]) > 0.75)
