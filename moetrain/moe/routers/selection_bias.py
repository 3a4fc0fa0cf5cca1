"""A bias that selects and never weights, moved once a step by the load instead of a balance loss.

Sources: sign, Wang et al. 2024 (arXiv 2408.15664) and DeepSeek-V3; centred, Moonlight (arXiv 2502.16982); proportional,
LongCat-Flash (arXiv 2509.01322); quantile, Megatron-LM's quantile balancing.
"""

from __future__ import annotations

from torch import Tensor

from moetrain.moe.routers.scoring import best_experts


def moved_by_sign(bias_E: Tensor, counts_E: Tensor, target: Tensor, rate: float, centred: bool) -> Tensor:
    """A step of ``rate`` up where fewer than ``target`` assignments came, down where more did.

    counts_E: int64, of the whole step and before dropping. target: scalar, the even load. centred: less the mean of the
    steps, so that the bias keeps its sum.
    """
    return bias_E + rate * _centred((target - counts_E.double()).sign(), centred).float()


def moved_in_proportion(bias_E: Tensor, counts_E: Tensor, target: Tensor, rate: float, centred: bool) -> Tensor:
    """As by sign, but by ``rate`` times the lack of load relative to ``target``; no load at all moves nothing.

    LongCat-Flash writes ``mu * (K_e / (K N) - c / (K T))``, K_e = K N / (N + Z) of a token's K choices being real. Its
    target is c = K T / (N + Z), as ours, and its step is ours at ``rate = mu / (N + Z)``.
    """
    lack_E = (target - counts_E.double()) / target.clamp_min(1.0)
    return bias_E + rate * _centred(lack_E, centred).float()


def quantile_of(selection_TE: Tensor, biased_TE: Tensor, top_k: int) -> Tensor:
    """The bias under which each expert would have had its even share of this micro-batch, [E], no gradient.

    With alpha_t, the first value that token t did not choose, the (kT/E + 1)-th largest of s_e - alpha is the offset
    that lets kT/E tokens prefer expert e; the bias is its negative. Where kT/E is no whole number it is rounded down.
    A quantile of a micro-batch is not one of the whole batch, and their mean depends on how it is cut: on the layout
    and on accumulation.
    """
    selection_TE = selection_TE.detach()
    num_tokens, num_experts = selection_TE.shape
    first_left_T1 = biased_TE.gather(1, best_experts(biased_TE, top_k + 1)[:, -1:])
    margin_TE = (selection_TE - first_left_T1.detach()).sort(dim=0, descending=True).values
    return -margin_TE[num_tokens * top_k // num_experts]


def moved_to_quantile(bias_E: Tensor, quantile_E: Tensor, rate: float) -> Tensor:
    """``rate`` of the way to the centred mean of ``quantile_of`` over the micro-batches of a step."""
    return bias_E + rate * (_centred(quantile_E, True).float() - bias_E)


def _centred(values_E: Tensor, centred: bool) -> Tensor:
    return values_E - values_E.mean() if centred else values_E
