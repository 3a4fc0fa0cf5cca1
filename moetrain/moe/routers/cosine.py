"""Cosine routing on a low-dimensional sphere with a learned temperature (Chi et al. 2022, X-MoE; Tutel)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from moetrain.moe.replay import Replay
from moetrain.moe.routers.base import Router
from moetrain.moe.routers.scoring import best_experts
from moetrain.ops.init import Draw
from moetrain.types import Problem, RouterInput, RouterSite, RouterTraits, Routing

MAX_SCALE = 100.0
EMBEDDING_STD = 0.01


class CosineRouter(Router):
    """Logits ``cos(W x, e_i) * exp(min(s, ln 100))``; then top-k.

    W: [projection_dim, D], without a bias; e: [E, projection_dim]; s: learned, one number for all experts, from
    ``ln(1 / temperature)``. weights ``scores``: probabilities of the softmax over all experts; ``chosen_softmax``: over
    the chosen.
    """

    def __init__(
        self,
        *,
        site: RouterSite,
        top_k: int = 2,
        projection_dim: int = 256,
        temperature: float = 0.5,
        weights: Literal["scores", "chosen_softmax"] = "scores",
    ) -> None:
        super().__init__(site)
        self.top_k, self.temperature, self.weights = top_k, temperature, weights
        self.projection = nn.Parameter(torch.empty(projection_dim, site.dim, device=site.device))
        self.embedding = nn.Parameter(torch.empty(site.num_experts, projection_dim, device=site.device))
        self.log_scale = nn.Parameter(torch.empty(1, device=site.device))

    @staticmethod
    def traits(*, top_k: int, **_: Any) -> RouterTraits:
        return RouterTraits(experts_per_token=top_k, per_expert=("embedding",))

    @staticmethod
    def problems(*, top_k: int, projection_dim: int, temperature: float, weights: str, **_: Any) -> list[Problem]:
        problems = []
        if projection_dim < 1:
            reason = "there is no sphere of no dimension"
            problems.append(Problem("router.projection_dim", projection_dim, reason, "set router.projection_dim=256"))
        if temperature <= 0:
            reason = "logits are divided by it, so it must be greater than 0"
            problems.append(Problem("router.temperature", temperature, reason, "set router.temperature=0.5"))
        elif temperature <= 1 / MAX_SCALE:
            reason = (
                f"must be greater than {1 / MAX_SCALE:g}: the scale 1 / temperature is held at {MAX_SCALE:g} at most,"
                " where it would get no gradient"
            )
            problems.append(Problem("router.temperature", temperature, reason, "set router.temperature=0.5"))
        if top_k == 1 and weights == "chosen_softmax":
            reason = "softmax over one chosen logit is always 1, so the router would get no gradient from the model"
            problems.append(Problem("router.weights", weights, reason, "set router.weights=scores, or router.top_k=2"))
        return problems

    def init_weights(self, draw: Draw, std: float) -> None:
        draw.normal_(self.projection, "projection", std)
        draw.normal_(self.embedding, "embedding", EMBEDDING_STD)
        nn.init.constant_(self.log_scale, -math.log(self.temperature))

    def forward(self, given: RouterInput, replay: Replay) -> Routing:
        logits_TE = self._logits(given.x_TD.float())
        expert_TK = replay.once("expert", lambda: best_experts(logits_TE, self.top_k))
        probs_TE = logits_TE.softmax(-1)
        if self.weights == "scores":
            weight_TK = probs_TE.gather(1, expert_TK)
        else:
            weight_TK = logits_TE.gather(1, expert_TK).softmax(-1)
        return Routing(logits_TE, probs_TE, expert_TK, weight_TK)

    def _logits(self, x_TD: Tensor) -> Tensor:
        direction_TP = normalize(linear(x_TD, self.projection.float()), dim=-1)
        scale = self.log_scale.float().clamp_max(math.log(MAX_SCALE)).exp()
        return linear(direction_TP, normalize(self.embedding.float(), dim=-1)) * scale
