"""How unevenly weights lie on experts."""

from __future__ import annotations

from torch import Tensor


def summed_weights(expert_TK: Tensor, weight_TK: Tensor, num_experts: int, num_sets: int = 1) -> Tensor:
    """The weights of each expert over each of X = ``num_sets`` sets of tokens, equally long, in a row; [X, E].

    weight_TK: 0 where an entry is no assignment; the result has its dtype and a gradient.
    """
    weight_TE = weight_TK.new_zeros(expert_TK.shape[0], num_experts).scatter(1, expert_TK, weight_TK)
    return weight_TE.view(num_sets, -1, num_experts).sum(1)


def cv_squared(summed_XE: Tensor) -> Tensor:
    """Squared coefficient of variation, scalar: variance (mean over E, not E - 1) by squared mean of each row, then the
    mean over rows; 0 for a row of zeros.
    """
    mean_X1 = summed_XE.mean(-1, keepdim=True)
    variance_X = (summed_XE - mean_X1).square().mean(-1)
    return (variance_X / mean_X1.squeeze(-1).square().clamp(min=1e-10)).mean()
