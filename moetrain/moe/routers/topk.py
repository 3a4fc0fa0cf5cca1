"""The router that moetrain began with: linear logits, top-k, softmax over the chosen; noise in training only.

Sources: Shazeer et al. 2017 (noisy top-k), Lepikhin et al. 2020 (GShard), Fedus et al. 2021 (Switch: one choice,
weights from the softmax over all, jitter on the router's input).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from moetrain.moe.replay import Replay
from moetrain.moe.routers.base import Router
from moetrain.ops.init import Draw
from moetrain.types import Problem, RouterInput, RouterSite, RouterTraits, Routing


class TopKRouter(Router):
    """Logits ``x W^T`` in fp32; the k largest win, ties go to the lower expert id.

    weights ``chosen``: softmax over the chosen logits (sums to 1); ``all``: probabilities of the softmax over all
    experts. noise, in training only: ``jitter`` multiplies the router's own copy of x by U(1 - scale, 1 + scale);
    ``gaussian`` adds scale * N(0, 1) to the logits; ``learned`` adds softplus(x W_noise^T) * N(0, 1), and
    ``noise_scale`` has no part in it.
    """

    def __init__(
        self,
        *,
        site: RouterSite,
        top_k: int = 2,
        weights: Literal["chosen", "all"] = "chosen",
        noise: Literal["none", "jitter", "gaussian", "learned"] = "none",
        noise_scale: float = 0.01,
    ) -> None:
        super().__init__(site)
        self.top_k, self.weights, self.noise, self.noise_scale = top_k, weights, noise, noise_scale
        self.gate = nn.Parameter(torch.empty(site.num_experts, site.dim, device=site.device))
        if noise == "learned":
            self.noise_gate = nn.Parameter(torch.zeros(site.num_experts, site.dim, device=site.device))

    @staticmethod
    def traits(
        *, num_experts: int, top_k: int = 2, weights: str = "chosen", noise: str = "none", noise_scale: float = 0.01
    ) -> RouterTraits:
        return RouterTraits(experts_per_token=top_k, noise=noise)

    @staticmethod
    def problems(
        *,
        num_experts: int,
        top_k: int = 2,
        weights: str = "chosen",
        noise: str = "none",
        noise_scale: float = 0.01,
    ) -> list[Problem]:
        """Settings that would teach the router nothing, or make no noise that can be drawn."""
        problems = []
        if top_k == 1 and weights == "chosen":
            reason = "softmax over one chosen logit is always 1, so the router would get no gradient from the model"
            problems.append(Problem("router.weights", weights, reason, "set router.weights=all, or router.top_k=2"))
        limit = 1.0 if noise == "jitter" else float("inf")
        if not 0.0 <= noise_scale <= limit:
            fix = "set router.noise_scale=0.01, say"
            problems.append(Problem("router.noise_scale", noise_scale, f"must lie in [0, {limit:g}]", fix))
        return problems

    def init_weights(self, draw: Draw, std: float) -> None:
        draw.normal_(self.gate, "gate", std)

    def forward(self, given: RouterInput, replay: Replay) -> Routing:
        logits_TE = self._logits(given.x_TD.float())
        expert_TK = replay.once("expert", lambda: best_experts(logits_TE, self.top_k))
        probs_TE = logits_TE.softmax(-1)
        if self.weights == "chosen":
            weight_TK = logits_TE.gather(1, expert_TK).softmax(-1)
        else:
            weight_TK = probs_TE.gather(1, expert_TK)
        return Routing(logits_TE, probs_TE, expert_TK, weight_TK)

    def _logits(self, x_TD: Tensor) -> Tensor:
        noisy = self.training and self.noise != "none"
        if noisy and self.noise == "jitter":
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1.0 - self.noise_scale, 1.0 + self.noise_scale)
        logits_TE = torch.nn.functional.linear(x_TD, self.gate.float())
        if noisy and self.noise == "gaussian":
            logits_TE = logits_TE + self.noise_scale * torch.randn_like(logits_TE)
        if noisy and self.noise == "learned":
            std_TE = torch.nn.functional.softplus(torch.nn.functional.linear(x_TD, self.noise_gate.float()))
            logits_TE = logits_TE + std_TE * torch.randn_like(logits_TE)
        return logits_TE


def best_experts(score_TE: Tensor, top_k: int) -> Tensor:
    """The k best columns of each row, int64 [T, K], best first, ties to the lower id. No gradient."""
    return score_TE.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
