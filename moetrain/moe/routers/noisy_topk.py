"""Noisy top-k gating with the two losses it was published with: importance and smooth load (Shazeer et al. 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from moetrain.moe.replay import Replay
from moetrain.moe.routers.base import Router
from moetrain.moe.routers.scoring import best_experts
from moetrain.ops.init import Draw
from moetrain.types import Problem, RouterInput, RouterSite, RouterTraits, Routing

STD_MIN = 1e-6


class NoisyTopKRouter(Router):
    """``H = x W^T + softplus(x W_noise^T) * N(0, 1)``; the k largest of H win, weights are the softmax over them.

    Its own loss is ``importance_coef * CV^2(sum_t G_t) + load_coef * CV^2(Load)``, G the weights and Load what
    ``smooth_load`` says, with CV^2 the variance over experts divided by the squared mean. Evaluation adds no noise; the
    smooth load means nothing there, so the own loss that is reported then is the importance alone. Both gates start at
    0: at first it is the noise that chooses, evenly.
    """

    def __init__(
        self, *, site: RouterSite, top_k: int = 2, importance_coef: float = 0.1, load_coef: float = 0.1
    ) -> None:
        super().__init__(site)
        self.top_k, self.importance_coef, self.load_coef = top_k, importance_coef, load_coef
        self.gate = nn.Parameter(torch.zeros(site.num_experts, site.dim, device=site.device))
        self.noise_gate = nn.Parameter(torch.zeros(site.num_experts, site.dim, device=site.device))

    @staticmethod
    def traits(
        *, num_experts: int, top_k: int = 2, importance_coef: float = 0.1, load_coef: float = 0.1
    ) -> RouterTraits:
        return RouterTraits(experts_per_token=top_k, noise="learned", balance="own losses")

    @staticmethod
    def problems(
        *, num_experts: int, top_k: int = 2, importance_coef: float = 0.1, load_coef: float = 0.1
    ) -> list[Problem]:
        """Settings without a runner-up to measure the load against, or without a gradient from the model."""
        problems = []
        if top_k == 1:
            reason = "softmax over one chosen logit is always 1, so the gate would get no gradient from the model"
            problems.append(Problem("router.top_k", top_k, reason, "set router.top_k=2, or choose router=switch"))
        if num_experts <= top_k:
            reason = f"the smooth load compares with the expert that just lost, and of {num_experts} none loses"
            fix = f"set experts.num_experts={top_k + 1} or more"
            problems.append(Problem("router.top_k", top_k, reason, fix))
        for name, coef in (("importance_coef", importance_coef), ("load_coef", load_coef)):
            if coef < 0:
                reason = "a negative coefficient rewards imbalance"
                problems.append(Problem(f"router.{name}", coef, reason, f"set router.{name}=0.1"))
        return problems

    def init_weights(self, draw: Draw, std: float) -> None:
        nn.init.zeros_(self.gate)
        nn.init.zeros_(self.noise_gate)

    def forward(self, given: RouterInput, replay: Replay) -> Routing:
        x_TD = given.x_TD.float()
        clean_TE = linear(x_TD, self.gate.float())
        std_TE = softplus(linear(x_TD, self.noise_gate.float())).clamp_min(STD_MIN)
        logits_TE = clean_TE + std_TE * torch.randn_like(clean_TE) if self.training else clean_TE
        best_TX = replay.once("best", lambda: best_experts(logits_TE, self.top_k + 1))
        expert_TK = best_TX[:, : self.top_k].contiguous()
        weight_TK = logits_TE.gather(1, expert_TK).softmax(-1)
        importance_E = torch.zeros_like(clean_TE).scatter(1, expert_TK, weight_TK).sum(0)
        own_loss = self.importance_coef * cv_squared(importance_E)
        if self.training:
            own_loss = own_loss + self.load_coef * cv_squared(smooth_load(clean_TE, std_TE, logits_TE, best_TX))
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


def cv_squared(x_E: Tensor) -> Tensor:
    """Squared coefficient of variation, scalar: the variance (over E, not E - 1) by the squared mean; 0 of zeros."""
    return x_E.var(correction=0) / (x_E.mean().square() + 1e-10)
