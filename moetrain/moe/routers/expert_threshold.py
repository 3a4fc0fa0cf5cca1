"""Each expert takes the tokens whose logit exceeds its threshold, a running quantile (Sun et al. 2026)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moetrain.moe.replay import Replay
from moetrain.moe.routers.base import StepSeen
from moetrain.moe.routers.gated import GatedRouter
from moetrain.moe.routers.ragged import ragged_routing
from moetrain.moe.routers.scoring import probabilities
from moetrain.ops.init import Draw
from moetrain.types import Problem, RouterInput, RouterSite, RouterTraits, Routing

MEMORY = 100.0
"""So many steps make the running mean one step longer, until ``decay`` bounds it."""


class ExpertThresholdRouter(GatedRouter):
    """Expert choice without the look ahead: a threshold stands for the other tokens, so that every token is routed
    by itself, in training and in evaluation. A token gets anything from no expert to all, k = ``top_k`` in the mean.

    ``threshold_E``, on the logits, is a running mean of the logit that a share k / E of the tokens exceeds: of every
    micro-batch the value after its k T / E largest logits, averaged over the step's micro-batches and ranks, which
    stands for the quantile of all of them (a micro-batch should have many more than E / k tokens); after every step
    ``threshold <- d * threshold + (1 - d) * that``, d = ``decay``, or (1 + i) / (100 + i) in step i if that is less:
    at first, while logits move fast, the mean is over some 1 + i / 100 steps. Weights are the sigmoids of the logits.

    Thresholds lag by a step at least: where all logits of an expert rise or fall together from step to step, as they do
    at first under a high learning rate, a token has far more or fewer than k experts until they settle.

    The first step has seen nothing: the threshold starts at the quantile that normal gate weights give tokens of mean
    square 1, as a norm before the layer makes them. The rule is the paper's; the start, the faster mean at first, the
    sigmoid and the decay are choices made here.
    """

    def __init__(self, *, site: RouterSite, top_k: int = 2, decay: float = 0.99) -> None:
        super().__init__(site)
        self.top_k, self.decay = top_k, decay
        self.threshold_E: Tensor
        self.register_buffer("threshold_E", torch.zeros(site.num_experts, device=site.device))
        self.num_steps: Tensor
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.float32, device=site.device))

    @staticmethod
    def traits(*, top_k: int, **_: Any) -> RouterTraits:
        per_expert = ("gate", "threshold_E")
        return RouterTraits(experts_per_token=top_k, ragged=True, balance="thresholds", per_expert=per_expert)

    @staticmethod
    def problems(*, num_experts: int, top_k: int, decay: float) -> list[Problem]:
        problems = []
        if top_k == num_experts:
            reason = f"a threshold that all tokens exceed chooses nothing among {num_experts} experts"
            fix = f"set router.top_k={num_experts - 1} or less"
            problems.append(Problem("router.top_k", top_k, reason, fix))
        if not 0 <= decay < 1:
            reason = "must lie in [0, 1): it is the share of the old threshold in the new one"
            problems.append(Problem("router.decay", decay, reason, "set router.decay=0.99"))
        return problems

    @torch.no_grad()
    def init_weights(self, draw: Draw, std: float) -> None:
        super().init_weights(draw, std)
        above = torch.tensor(1.0 - self.top_k / self.site.num_experts, dtype=torch.float64)
        self.threshold_E.fill_(std * math.sqrt(self.site.dim) * float(torch.special.ndtri(above)))

    def forward(self, given: RouterInput, replay: Replay) -> Routing:
        logits_TE = self.logits(given.x_TD)
        chosen_TE = replay.once("chosen", lambda: logits_TE > self.threshold_E)
        if self.training:
            self.observe(self._quantiles(logits_TE.detach()))
        score_TE = logits_TE.sigmoid()
        return ragged_routing(logits_TE, probabilities(score_TE, "sigmoid"), score_TE, chosen_TE, replay)

    def _quantiles(self, logits_TE: Tensor) -> Tensor:
        """The logit of each expert that k T / E tokens exceed, and a 1 that counts it, [E + 1]; zeros of no tokens."""
        num_tokens, num_experts = logits_TE.shape
        if num_tokens == 0:
            return logits_TE.new_zeros(num_experts + 1)
        above = self.top_k * num_tokens // num_experts
        quantile_E = logits_TE.sort(dim=0, descending=True).values[above]
        return torch.cat([quantile_E, quantile_E.new_ones(1)])

    @property
    def adapts(self) -> bool:
        return True

    def adjust(self, seen: StepSeen) -> None:
        sum_E, num = seen.statistics_LS[seen.layer].split([self.site.num_experts, 1])
        mean_E = torch.where(num > 0, sum_E / num.clamp_min(1), self.threshold_E)
        decay = ((1 + self.num_steps) / (MEMORY + self.num_steps)).clamp(max=self.decay)
        self.threshold_E.lerp_(mean_E.float(), 1 - decay)
        self.num_steps.add_((num > 0).sum())
