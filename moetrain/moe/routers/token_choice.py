"""The router in which every token chooses its k experts: one class for most published mixtures of experts.

Sources: Shazeer et al. 2017 (top-k, noise), Lepikhin et al. 2020 (GShard: a random second), Fedus et al. 2021 (Switch),
DeepSeek-V2 and V3 (groups, sigmoid, a bias that only selects), and the families of ``conf/router``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from moetrain.moe.noise import Noise, NoiseKind
from moetrain.moe.replay import Replay
from moetrain.moe.routers import scoring
from moetrain.moe.routers.base import StepSeen
from moetrain.moe.routers.gated import GatedRouter
from moetrain.moe.routers.scoring import Bias, GroupScore, Renormalise, Score, Select, Settings, Weights, best_experts
from moetrain.moe.routers.selection_bias import moved_by_sign, moved_in_proportion, moved_to_quantile, quantile_of
from moetrain.moe.routers.token_choice_problems import settings_problems
from moetrain.types import Problem, RouterInput, RouterSite, RouterTraits, Routing


class TokenChoiceRouter(GatedRouter):
    """Logits ``softcap(logit_scale * (x W^T + gate_bias))`` in fp32; the k best win, ties go to the lower expert id.

    score: of the logits, over all experts. select: what the k best are best in; ``bias_E`` is added to it and to
    nothing else. weights: the scores of the chosen, or a softmax or sigmoid of their logits; then renormalised by
    their sum or p-norm (``renorm_eps`` added, at least ``renorm_min``), then times ``scale``.
    bias: ``frozen`` stays what was loaded; ``sign``, ``proportional`` and ``quantile`` move by the load of each step
    (see selection_bias.py), by ``bias_rate``, which for quantile is the share of the new in the running mean.
    num_groups, top_groups: experts outside of a token's best groups can't be chosen. zero_experts: so many experts
    more, which give the token back; their bias stays 0, and what the losses and the log look at, logits and
    probabilities, are those of the real experts among themselves. second: ``random`` drops GShard's second expert by
    its weight.
    noise, in training only: see moetrain.moe.noise; noise_steps: how long its warm-up lasts.
    """

    def __init__(
        self,
        *,
        site: RouterSite,
        top_k: int = 2,
        score: Score = "softmax",
        select: Select = "scores",
        weights: Weights = "scores",
        renormalise: Renormalise = "none",
        renorm_p: float = 1.0,
        renorm_eps: float = 0.0,
        renorm_min: float = 0.0,
        scale: float = 1.0,
        bias: Bias = "none",
        bias_rate: float = 1e-3,
        bias_centred: bool = True,
        num_groups: int = 1,
        top_groups: int = 1,
        group_score: GroupScore = "max",
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        logit_bias: bool = False,
        weight_on: Literal["output", "input"] = "output",
        zero_experts: int = 0,
        second: Literal["always", "random"] = "always",
        noise: NoiseKind = "none",
        noise_scale: float = 0.01,
        noise_steps: int = 0,
    ) -> None:
        num_logits = site.num_experts + zero_experts
        super().__init__(site, num_logits, logit_bias)
        self.settings = Settings(
            top_k=top_k,
            score=score,
            select=select,
            weights=weights,
            renormalise=renormalise,
            renorm_p=renorm_p,
            renorm_eps=renorm_eps,
            renorm_min=renorm_min,
            scale=scale,
            bias=bias,
            bias_rate=bias_rate,
            bias_centred=bias_centred,
            num_groups=num_groups,
            top_groups=top_groups,
            group_score=group_score,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            logit_bias=logit_bias,
            weight_on=weight_on,
            zero_experts=zero_experts,
            second=second,
            noise=noise,
            noise_scale=noise_scale,
            noise_steps=noise_steps,
        )
        self.bias_rate = bias_rate
        self.noise = Noise(noise, noise_scale, noise_steps, site, num_logits)
        zeros_E = torch.zeros(site.num_experts, dtype=torch.float32, device=site.device)
        self.register_buffer("bias_E", None if bias == "none" else zeros_E)

    @staticmethod
    def traits(*, num_experts: int, **own: Any) -> RouterTraits:
        settings = Settings(**own)
        real = num_experts / (num_experts + settings.zero_experts)
        noises: list[str] = [settings.noise] if settings.noise != "none" else []
        noises += ["random second"] if settings.second == "random" else []
        return RouterTraits(
            experts_per_token=settings.top_k * real,
            ragged=settings.zero_experts > 0,
            noise=", ".join(noises) or "none",
            balance="none" if settings.bias == "none" else f"{settings.bias} bias",
            moves_bias=settings.bias not in ("none", "frozen"),
            per_expert=("gate", "gate_bias", "bias_E", "noise.gate"),
        )

    @staticmethod
    def problems(*, num_experts: int, **own: Any) -> list[Problem]:
        """Settings that would teach the router nothing, or that contradict each other."""
        return settings_problems(num_experts, Settings(**own))

    def forward(self, given: RouterInput, replay: Replay) -> Routing:
        settings = self.settings
        x_TD = self.noise.input(given.x_TD.float())
        clean_TA = self._logits(x_TD)
        logits_TA = self.noise.logits(clean_TA, x_TD)
        score_TA = scoring.scores(logits_TA, settings.score)
        selection_TA = (score_TA if settings.select == "scores" else logits_TA).detach()
        biased_TA = self._biased(selection_TA)
        if self.training and self._num_statistics:
            self.observe(self._statistics(clean_TA, selection_TA, biased_TA))
        allowed_TA = scoring.within_best_groups(
            biased_TA, settings.num_groups, settings.top_groups, settings.group_score
        )
        chosen_TK = replay.once("chosen", lambda: best_experts(allowed_TA, settings.top_k))
        weight_TK = scoring.combine_weights(logits_TA, score_TA, chosen_TK, settings)
        if settings.second == "random" and self.training:
            used_TK = replay.once("second", lambda: scoring.second_used(weight_TK))
            weight_TK = weight_TK.masked_fill(~used_TK, 0.0)
        num_experts = self.site.num_experts
        logits_TE, probs_TE = logits_TA[:, :num_experts], self._probabilities(logits_TA, score_TA)
        if settings.zero_experts == 0:
            return Routing(logits_TE, probs_TE, chosen_TK, weight_TK, weight_on=settings.weight_on)
        best_TK = replay.once("real", lambda: best_experts(allowed_TA[:, :num_experts], settings.top_k))
        parts = scoring.real_and_zero(chosen_TK, weight_TK, best_TK, num_experts)
        return Routing(logits_TE, probs_TE, parts.expert_TK, parts.weight_TK, parts.valid_TK, parts.identity_T)

    @property
    def adapts(self) -> bool:
        return self.settings.bias not in ("none", "frozen") or self.settings.noise == "warmup"

    @torch.no_grad()
    def adjust(self, seen: StepSeen) -> None:
        settings = self.settings
        own_S = seen.statistics_LS[seen.layer]
        if settings.noise == "warmup":
            self.noise.adjust(own_S[: self.noise.num_statistics])
        if settings.bias in ("none", "frozen"):
            return
        bias_E, rest_S = self.bias_E, own_S[self.noise.num_statistics :]
        if settings.bias == "quantile":
            bias_E.copy_(moved_to_quantile(bias_E, rest_S / seen.num, self.bias_rate))
            return
        target = seen.counts_E.double().mean()
        if settings.zero_experts:
            target = rest_S[0] * settings.top_k / (self.site.num_experts + settings.zero_experts)
        move = moved_by_sign if settings.bias == "sign" else moved_in_proportion
        bias_E.copy_(move(bias_E, seen.counts_E, target, self.bias_rate, settings.bias_centred))

    def _logits(self, x_TD: Tensor) -> Tensor:
        """fp32 [T, A], A = E and the zero experts, without noise on them."""
        return scoring.softcapped(self.logits(x_TD) * self.settings.logit_scale, self.settings.logit_softcap)

    def _probabilities(self, logits_TA: Tensor, score_TA: Tensor) -> Tensor:
        """Of the real experts alone, fp32 [T, E], rows summing to 1."""
        settings, num_experts = self.settings, self.site.num_experts
        if settings.zero_experts and settings.score == "softmax":
            return logits_TA[:, :num_experts].softmax(-1)
        return scoring.probabilities(score_TA[:, :num_experts], settings.score)

    def _biased(self, selection_TA: Tensor) -> Tensor:
        if self.bias_E is None:
            return selection_TA
        zeros_Z = self.bias_E.new_zeros(self.settings.zero_experts, dtype=torch.float32)
        return selection_TA + torch.cat([self.bias_E.float(), zeros_Z])

    @property
    def _num_statistics(self) -> int:
        """Length of what is observed: of the warm-up, then of the bias (quantiles, or with zero experts the tokens)."""
        settings = self.settings
        if settings.bias == "quantile":
            return self.noise.num_statistics + self.site.num_experts
        counts_tokens = settings.bias in ("sign", "proportional") and settings.zero_experts > 0
        return self.noise.num_statistics + int(counts_tokens)

    def numbers(self) -> dict[str, Tensor]:
        if self.bias_E is None:
            return {}
        return {"bias_rms": self.bias_E.square().mean().sqrt(), "bias_range": self.bias_E.max() - self.bias_E.min()}

    def _statistics(self, clean_TA: Tensor, selection_TA: Tensor, biased_TA: Tensor) -> Tensor:
        parts = [self.noise.statistics(clean_TA)] if self.noise.num_statistics else []
        if self.settings.bias == "quantile":
            empty = selection_TA.shape[0] == 0
            parts.append(self.bias_E if empty else quantile_of(selection_TA, biased_TA, self.settings.top_k))
        elif self._num_statistics > self.noise.num_statistics:
            parts.append(selection_TA.new_full((1,), selection_TA.shape[0]))
        return torch.cat(parts)
