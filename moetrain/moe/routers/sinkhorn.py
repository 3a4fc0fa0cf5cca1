"""Routing by an even transport plan found by Sinkhorn iterations (Clark et al. 2022, S-BASE; Megatron-LM)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from moetrain.moe.replay import Replay
from moetrain.moe.routers.gated import GatedRouter
from moetrain.moe.routers.scoring import best_experts
from moetrain.types import Problem, RouterInput, RouterSite, RouterTraits, Routing


class SinkhornRouter(GatedRouter):
    """In training the k largest entries of a token's row of the plan win, in evaluation its k largest logits.

    The plan is over this rank's micro-batch, so that in training a choice depends on later tokens; in evaluation it
    does not. Its columns are even, but the choice takes its largest entries only, so that the load is even more or
    less. Weights: the sigmoid of the chosen logit for k = 1, else the softmax over all experts, not normalised anew.
    The number of iterations is fixed: a tolerance would have to be read by the host in every one.
    """

    def __init__(self, *, site: RouterSite, top_k: int = 1, iterations: int = 20) -> None:
        super().__init__(site)
        self.top_k, self.iterations = top_k, iterations

    @staticmethod
    def traits(*, top_k: int, **_: Any) -> RouterTraits:
        return RouterTraits(experts_per_token=top_k, causal_train=False, balance="sinkhorn", per_expert=("gate",))

    @staticmethod
    def problems(*, iterations: int, **_: Any) -> list[Problem]:
        if iterations >= 1:
            return []
        reason = "without an iteration there is no plan"
        return [Problem("router.iterations", iterations, reason, "set router.iterations=20")]

    def forward(self, given: RouterInput, replay: Replay) -> Routing:
        logits_TE = self.logits(given.x_TD)
        expert_TK = replay.once("expert", lambda: self._choose(logits_TE.detach()))
        probs_TE = logits_TE.softmax(-1)
        activation_TE = logits_TE.sigmoid() if self.top_k == 1 else probs_TE
        return Routing(logits_TE, probs_TE, expert_TK, activation_TE.gather(1, expert_TK))

    def _choose(self, logits_TE: Tensor) -> Tensor:
        return best_experts(log_plan(logits_TE, self.iterations) if self.training else logits_TE, self.top_k)


def log_plan(logits_TE: Tensor, iterations: int) -> Tensor:
    """Logarithm of the plan ``u_t exp(logits_te) v_e``, columns summing to 1/E and rows, in the limit, to 1/T."""
    num_tokens, num_experts = logits_TE.shape
    plan_TE = logits_TE
    for _ in range(iterations):
        plan_TE = plan_TE - plan_TE.logsumexp(1, keepdim=True) - math.log(max(num_tokens, 1))
        plan_TE = plan_TE - plan_TE.logsumexp(0, keepdim=True) - math.log(num_experts)
    return plan_TE
