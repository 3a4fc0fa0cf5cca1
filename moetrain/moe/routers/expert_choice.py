"""Expert choice: experts take tokens, so the load is even by construction (Zhou et al. 2022)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from moetrain.moe.replay import Replay
from moetrain.moe.routers.gated import GatedRouter
from moetrain.moe.routers.ragged import ragged_routing
from moetrain.types import Problem, RouterInput, RouterSite, RouterTraits, Routing


class ExpertChoiceRouter(GatedRouter):
    """Each expert takes the ``n * experts_per_token / E`` tokens of n that have the highest probability for it.

    The n tokens are each sequence (``over=sequence``) or this rank's micro-batch (``micro_batch``); the number is
    rounded down, at least 1 and at most n; ties go to the earlier token. Weights are the probabilities, a softmax over
    experts, as they are. A token gets anything from no expert to all of them. Whether it is taken depends on the tokens
    after it, in training and in evaluation: the loss of a causal language model is then too good to be true.
    """

    def __init__(
        self,
        *,
        site: RouterSite,
        experts_per_token: float = 2.0,
        over: Literal["sequence", "micro_batch"] = "sequence",
    ) -> None:
        super().__init__(site)
        self.experts_per_token, self.over = experts_per_token, over

    @staticmethod
    def traits(*, experts_per_token: float, **_: Any) -> RouterTraits:
        return RouterTraits(
            experts_per_token, causal_train=False, causal_eval=False, ragged=True, balance="experts choose", even=True
        )

    @staticmethod
    def problems(*, num_experts: int, experts_per_token: float, **_: Any) -> list[Problem]:
        if 0 < experts_per_token <= num_experts:
            return []
        reason = f"a token is taken by more than none and at most all of {num_experts} experts, in the mean"
        return [Problem("router.experts_per_token", experts_per_token, reason, "set router.experts_per_token=2.0")]

    def forward(self, given: RouterInput, replay: Replay) -> Routing:
        logits_TE = self.logits(given.x_TD)
        probs_TE = logits_TE.softmax(-1)
        num_tokens, num_sequences = probs_TE.shape[0], given.tokens_BS.shape[0]
        pool = num_tokens // max(num_sequences, 1) if self.over == "sequence" else num_tokens
        chosen_TE = replay.once("chosen", lambda: self._taken(probs_TE, pool))
        return ragged_routing(logits_TE, probs_TE, probs_TE, chosen_TE, replay)

    def _taken(self, probs_TE: Tensor, pool: int) -> Tensor:
        """Which expert takes which token, bool [T, E]; the rows are sets of ``pool`` tokens, one after the other."""
        num_tokens, num_experts = probs_TE.shape
        take = min(max(int(pool * self.experts_per_token / num_experts), 1), pool)
        probs_XnE = probs_TE.detach().view(num_tokens // max(pool, 1), pool, num_experts)
        best_XnE = probs_XnE.sort(dim=1, descending=True, stable=True).indices[:, :take]
        return torch.zeros_like(probs_XnE, dtype=torch.bool).scatter(1, best_XnE, True).view(num_tokens, num_experts)
