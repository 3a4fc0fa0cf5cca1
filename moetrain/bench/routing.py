"""Inputs and a gate under which every router of the field chooses the experts that a benchmark wants."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Routing = Literal["balanced", "natural", "zipf", "skewed"]
ROUTINGS: tuple[Routing, ...] = ("balanced", "natural", "zipf")
FIRST_LOGIT, LOGIT_STEP, BLUR = 6.0, 0.5, 0.1


def gate_of(num_experts: int, dim: int, seed: int) -> Tensor:
    """fp32 [E, D], rows orthonormal where E <= D, so that a token can be made to choose."""
    drawn_DE = torch.randn(dim, num_experts, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(drawn_DE).Q.t().contiguous() if num_experts <= dim else drawn_DE.t() / dim**0.5


def tokens_of(routing: Routing, gate_ED: Tensor, num_tokens: int, top_k: int, seed: int) -> Tensor:
    """fp32 [T, D]. natural: what an untrained gate makes of noise. balanced: each expert is chosen equally often, where
    k divides E and E divides T k. zipf: expert i with weight 1 / (i + 1), so that the first rank of an EP group is hot.
    """
    num_experts, dim = gate_ED.shape
    generator = torch.Generator().manual_seed(seed)
    noise_TD = torch.randn(num_tokens, dim, generator=generator)
    if routing == "natural":
        return noise_TD
    choose = _even if routing == "balanced" else _zipf
    expert_TK = choose(num_tokens, num_experts, top_k, generator)
    return _choosing(expert_TK, gate_ED) + BLUR * noise_TD


def skewed_tokens(
    gate_ED: Tensor, num_tokens: int, top_k: int, seed: int, *, num_local: int, num_hot: int, share: float
) -> Tensor:
    """fp32 [T, D]: a ``share`` of the tokens chooses of the first ``num_hot`` experts only, each equally often, and the
    others of those after the first ``num_local``, which are another rank's.
    """
    (num_experts, dim), generator = gate_ED.shape, torch.Generator().manual_seed(seed)
    num_skewed = round(share * num_tokens)
    expert_TK = _even(num_skewed, num_hot, top_k, generator)
    if num_skewed < num_tokens:
        others_TK = num_local + _even(num_tokens - num_skewed, num_experts - num_local, top_k, generator)
        expert_TK = torch.cat([expert_TK, others_TK])
    return _choosing(expert_TK, gate_ED) + BLUR * torch.randn(num_tokens, dim, generator=generator)


def _choosing(expert_TK: Tensor, gate_ED: Tensor) -> Tensor:
    """Tokens that a gate sends to these experts, best first, [T, D]."""
    num_tokens, top_k = expert_TK.shape
    logit_K = FIRST_LOGIT - LOGIT_STEP * torch.arange(top_k) * 2 / max(top_k, 2)
    none_TE = torch.zeros(num_tokens, gate_ED.shape[0])
    return none_TE.scatter_(1, expert_TK, logit_K.expand(num_tokens, -1)) @ gate_ED


def _even(num_tokens: int, num_experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """Permutation after permutation of the experts, cut into pieces of k."""
    per_draw = num_experts // top_k
    draws = -(-num_tokens // per_draw)
    order_XE = torch.rand(draws, num_experts, generator=generator).argsort(1)
    return order_XE[:, : per_draw * top_k].reshape(-1, top_k)[:num_tokens]


def _zipf(num_tokens: int, num_experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """Without replacement, by the largest of perturbed logarithms (Gumbel)."""
    log_E = -torch.arange(1, num_experts + 1).log()
    uniform_TE = torch.rand(num_tokens, num_experts, generator=generator).clamp_min(1e-12)
    return (log_E - (-uniform_TE.log()).log()).topk(top_k).indices
