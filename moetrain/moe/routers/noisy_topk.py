"""Noisy top-k gating with the two losses it was published with: importance and smooth load (Shazeer et al. 2017)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moetrain.moe.noise import Noise
from moetrain.moe.replay import Replay
from moetrain.moe.routers.gated import GatedRouter
from moetrain.moe.routers.scoring import best_experts
from moetrain.ops.init import Draw
from moetrain.ops.spread import cv_squared, summed_weights
from moetrain.types import Problem, RouterInput, RouterSite, RouterTraits, Routing


class NoisyTopKRouter(GatedRouter):
    """``H = x W^T + softplus(x W_noise^T) * N(0, 1)``; the k largest of H win, weights are the softmax over them.

    Its own loss is ``importance_coef * CV^2(sum_t G_t) + load_coef * CV^2(Load)``, G the weights and Load what
    ``smooth_load`` says, with CV^2 the variance over experts divided by the squared mean. Evaluation adds no noise; the
    smooth load means nothing there, so the own loss that is reported then is the importance alone. The sums are over
    this rank's micro-batch, so the loss depends on the layout and on accumulation. Both gates start at 0: at first it
    is the noise that chooses, evenly.
    """

    def __init__(
        self, *, site: RouterSite, top_k: int = 2, importance_coef: float = 0.1, load_coef: float = 0.1
    ) -> None:
        super().__init__(site)
        self.top_k, self.importance_coef, self.load_coef = top_k, importance_coef, load_coef
        self.noise = Noise("learned", 0.0, 0, site, site.num_experts)

    @staticmethod
    def traits(*, top_k: int, **_: Any) -> RouterTraits:
        per_expert = ("gate", "noise.gate")
        return RouterTraits(experts_per_token=top_k, noise="learned", balance="own losses", per_expert=per_expert)

    @staticmethod
    def problems(*, num_experts: int, top_k: int, importance_coef: float, load_coef: float) -> list[Problem]:
        """Settings without a runner-up to measure the load against, or without a gradient from the model."""
        problems = []
        if top_k == 1:
            reason = "softmax over one chosen logit is always 1, so the gate would get no gradient from the model"
            problems.append(Problem("router.top_k", top_k, reason, "set router.top_k=2, or choose router=switch"))
        if num_experts <= top_k:
            reason = f"the smooth load compares with the expert that just lost, and of {num_experts} none loses"
            fewer = f"router.top_k={num_experts - 1} or less, or " if num_experts > 2 else ""
            fix = f"set {fewer}experts.num_experts={top_k + 1} or more"
            problems.append(Problem("router.top_k", top_k, reason, fix))
        for name, coef in (("importance_coef", importance_coef), ("load_coef", load_coef)):
            if coef < 0:
                reason = "a negative coefficient rewards imbalance"
                problems.append(Problem(f"router.{name}", coef, reason, f"set router.{name}=0.1"))
        return problems

    def init_weights(self, draw: Draw, std: float) -> None:
        nn.init.zeros_(self.gate)
        nn.init.zeros_(self.noise.gate)

    def forward(self, given: RouterInput, replay: Replay) -> Routing:
        x_TD = given.x_TD.float()
        clean_TE = self.logits(x_TD)
        logits_TE = self.noise.logits(clean_TE, x_TD)
        best_TX = replay.once("best", lambda: best_experts(logits_TE, self.top_k + 1))
        expert_TK = best_TX[:, : self.top_k].contiguous()
        weight_TK = logits_TE.gather(1, expert_TK).softmax(-1)
        own_loss = self.importance_coef * cv_squared(summed_weights(expert_TK, weight_TK, self.site.num_experts))
        if self.training:
            load_E = smooth_load(clean_TE, self.noise.learned_std(x_TD), logits_TE, best_TX)
            own_loss = own_loss + self.load_coef * cv_squared(load_E.unsqueeze(0))
        return Routing(logits_TE, logits_TE.softmax(-1), expert_TK, weight_TK, own_loss=own_loss)


def smooth_load(clean_TE: Tensor, std_TE: Tensor, logits_TE: Tensor, best_TX: Tensor) -> Tensor:
    """How many tokens each expert would get if its noise alone were drawn anew: expected, differentiable, fp32 [E].

    ``sum_t Phi((clean - threshold) / std)``, the threshold being the k-th largest of the token's other noisy logits.
    best_TX: int64 [T, k + 1], the best experts by ``logits_TE`` and the one that just lost.
    """
    top_k = best_TX.shape[1] - 1
    last_T1, lost_T1 = logits_TE.gather(1, best_TX[:, top_k - 1 :]).split(1, dim=1)
    kept_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, best_TX[:, :top_k], True)
    threshold_TE = torch.where(kept_TE, lost_T1, last_T1)
    return torch.special.ndtr((clean_TE - threshold_TE) / std_TE).sum(0)
