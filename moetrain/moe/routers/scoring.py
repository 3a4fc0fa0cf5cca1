"""From logits to a choice and its weights: pure functions, shared by the routers in which tokens choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from moetrain.moe.noise import NoiseKind

Score = Literal["softmax", "sigmoid", "sqrtsoftplus"]
Select = Literal["scores", "logits"]
Weights = Literal["scores", "chosen_softmax", "chosen_sigmoid"]
Renormalise = Literal["none", "sum", "p_norm"]
Bias = Literal["none", "frozen", "sign", "proportional", "quantile"]
GroupScore = Literal["max", "top2_sum"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The parameters of ``TokenChoiceRouter``, where each is explained and has its default."""

    top_k: int
    score: Score
    select: Select
    weights: Weights
    renormalise: Renormalise
    renorm_p: float
    renorm_eps: float
    renorm_min: float
    scale: float
    bias: Bias
    bias_rate: float
    bias_centred: bool
    num_groups: int
    top_groups: int
    group_score: GroupScore
    logit_scale: float
    logit_softcap: float | None
    logit_bias: bool
    weight_on: Literal["output", "input"]
    zero_experts: int
    second: Literal["always", "random"]
    noise: NoiseKind
    noise_scale: float
    noise_steps: int


def best_experts(score_TE: Tensor, top_k: int) -> Tensor:
    """The k best columns of each row, int64 [T, K], best first, ties to the lower id. No gradient.

    One maximum after the other: ``topk`` leaves the order of ties open, and a stable sort takes up to five times as
    long. What is chosen falls below what is lowest, so that nothing is chosen twice.
    """
    left_TE, chosen = score_TE.detach().clamp(min=torch.finfo(score_TE.dtype).min), []
    for _ in range(top_k):
        chosen.append(left_TE.argmax(dim=-1, keepdim=True))
        left_TE.scatter_(1, chosen[-1], -torch.inf)
    return torch.cat(chosen, dim=1)


def scores(logits_TE: Tensor, score: Score) -> Tensor:
    """How much each expert suits each token, fp32 [T, E], each at least 0.

    The square root of softplus (DeepSeek-V4) is cut off below a logit of -80, where it is 4e-18: its gradient is 0
    there, while the formula, underflowing, would give inf * 0.
    """
    if score == "softmax":
        return logits_TE.softmax(-1)
    if score == "sigmoid":
        return logits_TE.sigmoid()
    return softplus(logits_TE.clamp(min=-80.0)).sqrt()


def probabilities(score_TE: Tensor, score: Score) -> Tensor:
    """Scores as shares of their row, what the balance loss looks at; those of a softmax are that, and not divided."""
    if score == "softmax":
        return score_TE
    return score_TE / score_TE.sum(-1, keepdim=True).clamp_min(torch.finfo(score_TE.dtype).tiny)


def softcapped(logits_TE: Tensor, cap: float | None) -> Tensor:
    """``cap * tanh(l / cap)``: logits within (-cap, cap)."""
    return logits_TE if cap is None else cap * torch.tanh(logits_TE / cap)


def within_best_groups(selection_TE: Tensor, num_groups: int, top_groups: int, group_score: GroupScore) -> Tensor:
    """``selection_TE`` with -inf for experts outside of each token's best groups (DeepSeek-V2, V3).

    A group is E / num_groups experts in a row, as good as its best expert (``max``) or its best two together. The mask
    is -inf rather than 0, which would beat every allowed expert whose biased score is negative.
    """
    if num_groups == top_groups:
        return selection_TE
    num_tokens, num_experts = selection_TE.shape
    grouped_TGe = selection_TE.view(num_tokens, num_groups, num_experts // num_groups)
    group_TG = grouped_TGe.topk(1 if group_score == "max" else 2, dim=-1).values.sum(-1)
    forbidden_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter(1, best_experts(group_TG, top_groups), False)
    return grouped_TGe.masked_fill(forbidden_TG.unsqueeze(-1), float("-inf")).reshape(num_tokens, num_experts)


def combine_weights(logits_TE: Tensor, score_TE: Tensor, chosen_TK: Tensor, settings: Settings) -> Tensor:
    """The weights of the chosen, fp32 [T, K], differentiable; nothing that only selects (a bias) has part in them."""
    if settings.weights == "scores":
        weight_TK = score_TE.gather(1, chosen_TK)
    else:
        chosen_logits_TK = logits_TE.gather(1, chosen_TK)
        softmax = settings.weights == "chosen_softmax"
        weight_TK = chosen_logits_TK.softmax(-1) if softmax else chosen_logits_TK.sigmoid()
    return renormalised(weight_TK, settings) * settings.scale


def renormalised(weight_TK: Tensor, settings: Settings) -> Tensor:
    """Weights divided by their sum, or by their p-norm, plus ``renorm_eps`` and then at least ``renorm_min``."""
    if settings.renormalise == "none":
        return weight_TK
    size_T1 = p_norm(weight_TK, 1.0 if settings.renormalise == "sum" else settings.renorm_p)
    return weight_TK / (size_T1 + settings.renorm_eps).clamp_min(settings.renorm_min)


def p_norm(weight_TK: Tensor, p: float) -> Tensor:
    """Of each row, [T, 1]. Powers are taken of weights divided by the largest, so that a large p underflows none of
    them to a row of zeros. Any factor taken out of a norm, as a constant too, leaves its value and gradient.
    """
    if p == 1.0:
        return torch.linalg.vector_norm(weight_TK, ord=1.0, dim=-1, keepdim=True)
    most_T1 = weight_TK.detach().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(weight_TK.dtype).tiny)
    return most_T1 * torch.linalg.vector_norm(weight_TK / most_T1, ord=p, dim=-1, keepdim=True)


def second_used(weight_TK: Tensor) -> Tensor:
    """GShard's draw, bool [T, 2]: the second expert of a token is used iff 2 w2 > U(0, 1), w normalised over the two.

    No gradient. What is not used keeps its place in the expert's queue, as in GShard's Algorithm 1, with weight 0.
    """
    weight_TK = weight_TK.detach()
    used_T = 2.0 * weight_TK[:, 1] > torch.rand_like(weight_TK[:, 1]) * weight_TK.sum(-1)
    return torch.stack([torch.ones_like(used_T), used_T], dim=-1)


@dataclass(frozen=True)
class RealAndZero:
    """A choice among E real experts and more that give the token back, taken apart.

    expert_TK: int64, the real ones first, best first, then ids that are no assignments; distinct. valid_TK: bool.
    weight_TK: fp32, 0 where invalid. identity_T: fp32, the weight of all chosen zero experts together.
    """

    expert_TK: Tensor
    valid_TK: Tensor
    weight_TK: Tensor
    identity_T: Tensor


def real_and_zero(chosen_TK: Tensor, weight_TK: Tensor, best_real_TK: Tensor, num_experts: int) -> RealAndZero:
    """Take apart a choice whose ids from ``num_experts`` on are zero experts.

    ``best_real_TK``: the k best real experts by the same selection. The m real ones of the chosen are its first m, so
    that its others are distinct from them and fill the row.
    """
    real_TK = chosen_TK < num_experts
    order_TK = real_TK.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices
    valid_TK = real_TK.gather(1, order_TK)
    real_weight_TK = weight_TK.gather(1, order_TK).masked_fill(~valid_TK, 0.0)
    return RealAndZero(best_real_TK, valid_TK, real_weight_TK, weight_TK.masked_fill(real_TK, 0.0).sum(-1))
