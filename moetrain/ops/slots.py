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


def count_by_choice(expert_TK: Tensor, num_experts: int) -> Tensor:
    """Assignments per choice rank and expert, int64 [K, E]."""
    counts_KE = torch.zeros(expert_TK.shape[1], num_experts, dtype=torch.int64, device=expert_TK.device)
    return counts_KE.scatter_add_(1, expert_TK.t(), torch.ones_like(expert_TK.t()))


def queue_positions(expert_TK: Tensor, num_experts: int) -> Tensor:
    """Each assignment's position in its expert's queue, int64 [T, K]; all first choices stand before all second
    choices.

    The value equals the cumulative sum over one-hot rows (``queue_positions_by_cumsum``); a stable sort finds it in
    O(N log N) instead of O(N E) memory traffic.
    """
    num_tokens, top_k = expert_TK.shape
    expert_N = expert_TK.t().reshape(-1)
    order_N = torch.argsort(expert_N, stable=True)
    counts_E = count_experts(expert_TK, num_experts)
    start_E = counts_E.cumsum(0) - counts_E
    rank_N = torch.arange(expert_N.numel(), device=expert_TK.device) - start_E[expert_N[order_N]]
    return torch.empty_like(expert_N).scatter_(0, order_N, rank_N).view(top_k, num_tokens).t()


def queue_positions_by_cumsum(expert_TK: Tensor, num_experts: int) -> Tensor:
    """The plain reference: one-hot, permute to choice-major, cumulative sum, pick (GShard, Lepikhin et al. 2020,
    alg. 1).
    """
    one_hot_TKE = torch.nn.functional.one_hot(expert_TK, num_experts)
    num_tokens, top_k, _ = one_hot_TKE.shape
    choice_major_NE = one_hot_TKE.permute(1, 0, 2).reshape(top_k * num_tokens, num_experts)
    rank_NE = choice_major_NE.cumsum(0) - 1
    return (choice_major_NE * rank_NE).sum(-1).view(top_k, num_tokens).t()
