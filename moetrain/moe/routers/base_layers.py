"""BASE layers: tokens are assigned so that every expert gets equally many (Lewis et al. 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moetrain.moe.replay import Replay
from moetrain.moe.routers.base import Router
from moetrain.moe.routers.scoring import best_experts
from moetrain.ops.auction import balanced_assignment
from moetrain.ops.init import Draw
from moetrain.types import RouterInput, RouterSite, RouterTraits, Routing

GAIN = 0.1


class BaseLayersRouter(Router):
    """One expert a token: by ``balanced_assignment`` of this rank's micro-batch in training, the nearest in evaluation.

    Affinities are ``x . c_e``, the centroids c orthogonal with gain 0.1 at the start; what is added to the residual is
    ``sigmoid(x . c_e) FFN_e(x)``. The published code mixes, by that sigmoid, the token h with an expert that is a
    residual block, h + FFN_e(norm(h)): the parts of h sum to h, which leaves the same. Here x is norm(h), by the norm
    before the layer, which all experts share; there the experts have their own, and affinities are those of h. Every
    rank assigns its own tokens, they are not shuffled between ranks first. The assignment depends on later tokens,
    hence in training only; it is made by a loop on the host.
    """

    def __init__(self, *, site: RouterSite) -> None:
        super().__init__(site)
        self.centroids = nn.Parameter(torch.empty(site.num_experts, site.dim, device=site.device))

    @staticmethod
    def traits(**_: Any) -> RouterTraits:
        return RouterTraits(experts_per_token=1, causal_train=False, balance="assignment", even=True)

    def init_weights(self, draw: Draw, std: float) -> None:
        if self.centroids.is_meta:
            return
        values_ED = nn.init.orthogonal_(torch.empty(self.centroids.shape), GAIN, generator=draw.generator("centroids"))
        with torch.no_grad():
            self.centroids.copy_(values_ED)

    def forward(self, given: RouterInput, replay: Replay) -> Routing:
        logits_TE = linear(given.x_TD.float(), self.centroids.float())
        expert_TK = replay.once("expert", lambda: self._choose(logits_TE))
        weight_TK = logits_TE.gather(1, expert_TK).sigmoid()
        return Routing(logits_TE, logits_TE.softmax(-1), expert_TK, weight_TK)

    def _choose(self, logits_TE: Tensor) -> Tensor:
        return balanced_assignment(logits_TE).unsqueeze(1) if self.training else best_experts(logits_TE, 1)
