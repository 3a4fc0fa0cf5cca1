"""Experts by token id, from a table that is never trained (Roller et al. 2021; DeepSeek-V4's first layers)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moetrain.moe.replay import Replay
from moetrain.moe.routers.base import Router
from moetrain.moe.routers.scoring import probabilities, scores
from moetrain.ops.init import Draw
from moetrain.types import Problem, RouterInput, RouterSite, RouterTraits, Routing

EPSILON = 1e-20


class HashRouter(Router):
    """A token goes to the k experts that the table ``expert_VK`` (int64, saved with the weights) has for its id.

    assignment ``random``: k different experts drawn for each id, another table in every layer; ``balanced``: id v has
    experts ``v k, v k + 1, ...`` modulo E, equally many ids an expert. The load is still that of the ids: one that is
    frequent bounds it. weights ``one``: each 1, nothing is trained, and to the balance loss all experts are alike;
    else this score of trained logits, as it is or divided by its sum over the chosen, times ``scale``.
    """

    def __init__(
        self,
        *,
        site: RouterSite,
        top_k: int = 1,
        assignment: Literal["random", "balanced"] = "random",
        weights: Literal["one", "softmax", "sigmoid", "sqrtsoftplus"] = "one",
        renormalise: Literal["none", "sum"] = "none",
        scale: float = 1.0,
    ) -> None:
        super().__init__(site)
        self.top_k, self.assignment, self.weights = top_k, assignment, weights
        self.renormalise, self.scale = renormalise, scale
        table_VK = torch.zeros(site.vocab_size, top_k, dtype=torch.int64, device=site.device)
        self.expert_VK: Tensor
        self.register_buffer("expert_VK", table_VK)
        if weights != "one":
            self.gate = nn.Parameter(torch.empty(site.num_experts, site.dim, device=site.device))

    @staticmethod
    def traits(*, top_k: int, **_: Any) -> RouterTraits:
        return RouterTraits(experts_per_token=top_k, needs_tokens=True, balance="hash")

    @staticmethod
    def problems(*, top_k: int, weights: str, renormalise: str, scale: float, **_: Any) -> list[Problem]:
        problems = []
        if scale <= 0 and weights != "one":
            reason = "weights must be more than nothing"
            problems.append(Problem("router.scale", scale, reason, "set router.scale=1.0"))
        own = {"renormalise": (renormalise, "none"), "scale": (scale, 1.0)}
        for name, (value, usual) in own.items() if weights == "one" else ():
            if value != usual:
                reason = "has no part in router.weights=one: each weight is 1"
                fix = f"set router.{name}={usual}, or router.weights=softmax"
                problems.append(Problem(f"router.{name}", value, reason, fix))
        if top_k == 1 and weights != "one" and renormalise == "sum":
            reason = "one weight divided by itself is always 1, so the logits would get no gradient from the model"
            fix = "set router.renormalise=none, or router.weights=one"
            problems.append(Problem("router.renormalise", renormalise, reason, fix))
        return problems

    @torch.no_grad()
    def init_weights(self, draw: Draw, std: float) -> None:
        if self.weights != "one":
            draw.normal_(self.gate, "gate", std)
        if self.expert_VK.is_meta:
            return
        (vocab_size, top_k), num_experts = self.expert_VK.shape, self.site.num_experts
        if self.assignment == "random":
            even_VE = torch.ones(vocab_size, num_experts)
            table_VK = torch.multinomial(even_VE, top_k, generator=draw.generator("expert_VK"))
        else:
            table_VK = torch.arange(vocab_size * top_k).view(vocab_size, top_k) % num_experts
        self.expert_VK.copy_(table_VK)

    def forward(self, given: RouterInput, replay: Replay) -> Routing:
        expert_TK = replay.once("expert", lambda: self.expert_VK[given.tokens_BS.reshape(-1)])
        if self.weights == "one":
            logits_TE = torch.zeros(len(expert_TK), self.site.num_experts, device=given.x_TD.device)
            score_TE, probs_TE = torch.ones_like(logits_TE), logits_TE.softmax(-1)
        else:
            logits_TE = linear(given.x_TD.float(), self.gate.float())
            score_TE = scores(logits_TE, self.weights)
            probs_TE = probabilities(score_TE, self.weights)
        weight_TK = score_TE.gather(1, expert_TK)
        if self.renormalise == "sum":
            weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + EPSILON)
        return Routing(logits_TE, probs_TE, expert_TK, weight_TK * self.scale)
