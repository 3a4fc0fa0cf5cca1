"""As many experts as it takes for their probabilities to reach a threshold (Huang et al. 2024)."""

from __future__ import annotations

import math
from typing import Any

from torch.nn.functional import pad

from moetrain.moe.replay import Replay
from moetrain.moe.routers.gated import GatedRouter
from moetrain.moe.routers.scoring import best_experts
from moetrain.types import Problem, RouterInput, RouterSite, RouterTraits, Routing


class TopPRouter(GatedRouter):
    """A token goes to its most probable experts, the fewest whose probabilities sum to ``threshold`` or more.

    ``max_experts`` of them at most (null: all). Weights are the probabilities, not normalised anew. The own loss is
    ``entropy_coef`` times the mean entropy of the probabilities, without which they become even and the choice dense.
    At the start they are even, which takes ``threshold * E`` experts a token: that number, bounded, is what the traits
    expect; training brings it down.
    """

    def __init__(
        self,
        *,
        site: RouterSite,
        threshold: float = 0.4,
        max_experts: int | None = None,
        entropy_coef: float = 1e-4,
    ) -> None:
        super().__init__(site)
        self.threshold, self.entropy_coef = threshold, entropy_coef
        self.max_experts = max_experts or site.num_experts

    @staticmethod
    def traits(*, num_experts: int, threshold: float, max_experts: int | None, **_: Any) -> RouterTraits:
        expected = min(math.ceil(threshold * num_experts), max_experts or num_experts)
        return RouterTraits(experts_per_token=expected, ragged=True, per_expert=("gate",))

    @staticmethod
    def problems(*, num_experts: int, threshold: float, max_experts: int | None, entropy_coef: float) -> list[Problem]:
        problems = []
        if not 0 < threshold <= 1:
            reason = "probabilities sum to something in (0, 1]"
            problems.append(Problem("router.threshold", threshold, reason, "set router.threshold=0.4"))
        if max_experts is not None and not 1 <= max_experts <= num_experts:
            reason = f"a token needs at least one expert and has at most {num_experts}"
            fix = f"set router.max_experts={num_experts} or less, or null for all"
            problems.append(Problem("router.max_experts", max_experts, reason, fix))
        if entropy_coef < 0:
            reason = "a negative coefficient rewards entropy, and with it more experts"
            problems.append(Problem("router.entropy_coef", entropy_coef, reason, "set router.entropy_coef=0.0001"))
        return problems

    def forward(self, given: RouterInput, replay: Replay) -> Routing:
        logits_TE = self.logits(given.x_TD)
        log_probs_TE = logits_TE.log_softmax(-1)
        probs_TE = log_probs_TE.exp()
        expert_TK = replay.once("expert", lambda: best_experts(probs_TE, self.max_experts))
        prob_TK = probs_TE.gather(1, expert_TK)
        reached_TK = pad(prob_TK.detach().cumsum(-1)[:, :-1], (1, 0))
        valid_TK = replay.once("valid", lambda: reached_TK < self.threshold)
        entropy = -(probs_TE * log_probs_TE).sum() / max(probs_TE.shape[0], 1)
        weight_TK = prob_TK.masked_fill(~valid_TK, 0.0)
        return Routing(logits_TE, probs_TE, expert_TK, weight_TK, valid_TK, own_loss=self.entropy_coef * entropy)
