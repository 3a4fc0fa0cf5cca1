"""Which assignments go to which slot of their expert: counting and queue positions, deterministic on every device.

``bincount`` and ``histc`` are avoided (host synchronisation, non-determinism or no integer kernel on some back ends),
and so is ``topk`` on 0/1 masks, whose order among ties is undefined.
"""

from __future__ import annotations

import torch
from torch import Tensor


def count_experts(expert_TK: Tensor, num_experts: int, kept_TK: Tensor | None = None) -> Tensor:
    """Assignments per expert, int64 [E]; only those kept where a mask is given."""
    ones_N = torch.ones_like(expert_TK.reshape(-1)) if kept_TK is None else kept_TK.reshape(-1).to(torch.int64)
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=expert_TK.device)
    return counts_E.scatter_add_(0, expert_TK.reshape(-1), ones_N)


def count_by_choice(expert_TK: Tensor, num_experts: int, kept_TK: Tensor | None = None) -> Tensor:
    """Assignments per choice rank and expert, int64 [K, E]; only those kept where a mask is given."""
    ones_TK = torch.ones_like(expert_TK) if kept_TK is None else kept_TK.to(torch.int64)
    counts_KE = torch.zeros(expert_TK.shape[1], num_experts, dtype=torch.int64, device=expert_TK.device)
    return counts_KE.scatter_add_(1, expert_TK.t(), ones_TK.t())


def choice_major(expert_TK: Tensor) -> Tensor:
    """The order of service, int64 [N] of assignments t*K + k: all first choices before all second choices."""
    return torch.arange(expert_TK.numel(), device=expert_TK.device).view_as(expert_TK).t().reshape(-1)


def token_major(expert_TK: Tensor) -> Tensor:
    """All choices of the first token before those of the second."""
    return torch.arange(expert_TK.numel(), device=expert_TK.device)


def largest_first(score_TK: Tensor) -> Tensor:
    """In order of falling scores; equal ones in the order of their tokens."""
    return score_TK.reshape(-1).sort(descending=True, stable=True).indices


def best_tokens_first(best_T: Tensor, top_k: int) -> Tensor:
    """Choice-major, tokens in order of falling scores (V-MoE, Riquelme et al. 2021, batch prioritised routing)."""
    token_T = best_T.sort(descending=True, stable=True).indices
    return (token_T * top_k + torch.arange(top_k, device=best_T.device).unsqueeze(1)).reshape(-1)


def queue_positions(expert_TK: Tensor, num_experts: int, order_N: Tensor | None = None) -> Tensor:
    """Each assignment's position in its expert's queue, int64 [T, K]; served in ``order_N``, choice-major without it.

    For the choice-major order the value equals the cumulative sum over one-hot rows (``queue_positions_by_cumsum``);
    a stable sort finds it in O(N log N) instead of O(N E) memory traffic.
    """
    order_N = choice_major(expert_TK) if order_N is None else order_N
    served_N = expert_TK.reshape(-1)[order_N]
    by_expert_N = torch.argsort(served_N, stable=True)
    counts_E = count_experts(expert_TK, num_experts)
    start_E = counts_E.cumsum(0) - counts_E
    rank_N = torch.arange(served_N.numel(), device=expert_TK.device) - start_E[served_N[by_expert_N]]
    return torch.empty_like(served_N).scatter_(0, order_N[by_expert_N], rank_N).view_as(expert_TK)


def queue_positions_by_cumsum(expert_TK: Tensor, num_experts: int) -> Tensor:
    """The plain reference: one-hot, permute to choice-major, cumulative sum, pick (GShard, Lepikhin et al. 2020,
    alg. 1).
    """
    one_hot_TKE = torch.nn.functional.one_hot(expert_TK, num_experts)
    num_tokens, top_k, _ = one_hot_TKE.shape
    choice_major_NE = one_hot_TKE.permute(1, 0, 2).reshape(top_k * num_tokens, num_experts)
    rank_NE = choice_major_NE.cumsum(0) - 1
    return (choice_major_NE * rank_NE).sum(-1).view(top_k, num_tokens).t()
