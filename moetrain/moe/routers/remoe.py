"""ReLU routing, made sparse by an L1 loss whose coefficient finds itself (Wang et al. 2024, ReMoE)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moetrain.moe.replay import Replay
from moetrain.moe.routers.base import StepSeen
from moetrain.moe.routers.gated import GatedRouter
from moetrain.moe.routers.ragged import ragged_routing
from moetrain.types import Problem, RouterInput, RouterSite, RouterTraits, Routing

L1_MIN = 1e-12


class ReMoERouter(GatedRouter):
    """Weights ``R = relu(x W^T)``; a token goes to every expert whose weight is not 0. Differentiable throughout.

    The own loss is ``l1 * sum_e f_e * (sum_t R_te) / T`` with ``f_e = E / (k T)`` times the tokens of e, which has no
    gradient: it sparsifies, the loaded experts first. After every step the buffer ``l1`` is multiplied by ``l1_factor``
    while fewer than ``1 - k / E`` of the weights are 0 over all layers, ranks and micro-batches, else divided by it;
    it is the same number in all layers, starts at ``l1_start`` and stays within [1e-12, ``l1_max``]. k is ``top_k``.
    f_e and the sum are of this rank's micro-batch, so the loss, unlike the sparsity, depends on the layout and on
    accumulation.

    At the start half of the weights are positive, so a token has about E / 2 experts. Where tokens come in pairs x and
    -x, half of the logits x W^T stay positive whatever W is, and no loss can make that sparse short of zero weights:
    normalised activations with a mean are what it needs, or ``logit_bias``, a trained number per expert from 0.
    """

    def __init__(
        self,
        *,
        site: RouterSite,
        top_k: int = 2,
        l1_start: float = 1e-8,
        l1_factor: float = 1.2,
        l1_max: float = 1.0,
        logit_bias: bool = False,
    ) -> None:
        super().__init__(site, logit_bias=logit_bias)
        self.top_k, self.l1_factor, self.l1_max = top_k, l1_factor, l1_max
        self.l1: Tensor
        self.register_buffer("l1", torch.full((), l1_start, dtype=torch.float32, device=site.device))

    @staticmethod
    def traits(*, top_k: int, **_: Any) -> RouterTraits:
        per_expert = ("gate", "gate_bias")
        return RouterTraits(experts_per_token=top_k, ragged=True, balance="adaptive L1", per_expert=per_expert)

    @staticmethod
    def problems(*, l1_start: float, l1_factor: float, l1_max: float, **_: Any) -> list[Problem]:
        problems = []
        if l1_factor <= 1:
            reason = "the coefficient must grow while there are too many experts"
            problems.append(Problem("router.l1_factor", l1_factor, reason, "set router.l1_factor=1.2"))
        if l1_max < L1_MIN:
            reason = f"must be {L1_MIN:g} or more, which the coefficient never falls below"
            problems.append(Problem("router.l1_max", l1_max, reason, "set router.l1_max=1.0"))
        elif not L1_MIN <= l1_start <= l1_max:
            reason = f"must lie in [{L1_MIN:g}, router.l1_max = {l1_max:g}]"
            fix = f"set router.l1_start={min(1e-8, l1_max):g}" + (
                ", or a greater router.l1_max" if l1_start > l1_max else ""
            )
            problems.append(Problem("router.l1_start", l1_start, reason, fix))
        return problems

    def forward(self, given: RouterInput, replay: Replay) -> Routing:
        logits_TE = self.logits(given.x_TD)
        weight_TE = logits_TE.relu()
        active_TE = replay.once("active", lambda: logits_TE > 0)
        if self.training:
            num_active = active_TE.sum()
            self.observe(torch.stack([num_active, torch.full_like(num_active, active_TE.numel())]))
        own_loss = self.l1 * self._loaded_l1(weight_TE, active_TE)
        return ragged_routing(logits_TE, logits_TE.softmax(-1), weight_TE, active_TE, replay, own_loss)

    def _loaded_l1(self, weight_TE: Tensor, active_TE: Tensor) -> Tensor:
        num_tokens, num_experts = max(weight_TE.shape[0], 1), weight_TE.shape[1]
        load_E = active_TE.sum(0) * (num_experts / (self.top_k * num_tokens))
        return (load_E * weight_TE.sum(0)).sum() / num_tokens

    @property
    def adapts(self) -> bool:
        return True

    def adjust(self, seen: StepSeen) -> None:
        num_active, num = seen.statistics_LS.sum(0)
        excess = num_active * self.site.num_experts - self.top_k * num
        self.l1.mul_(self.l1_factor ** excess.sign()).clamp_(L1_MIN, self.l1_max)

    def numbers(self) -> dict[str, Tensor]:
        return {"l1": self.l1}
