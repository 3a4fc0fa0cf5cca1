"""Router losses, in units where an even load is 1.0, one value per layer.

balance: ``E * sum_e f_e * P_e`` with f_e the share of assignments of expert e, counted BEFORE dropping, and P_e the
mean router probability (Switch, Fedus et al. 2021, with f over all k choices). f has no gradient. z: ``mean_t
logsumexp(l_t)^2`` (ST-MoE, Zoph et al. 2022).

The scope is the set of tokens that f and P are means over:

- ``micro_batch``: the tokens of this rank; what a micro-batch is, and so the value, depends on the layout.
- ``sequence``: each sequence by itself, then the mean; the same under every layout, in value and in gradient.
- ``global_batch``: f over all ranks and all micro-batches of the step so far, P over this rank. f carries no gradient,
  so one all-reduce of integers is enough, and the mean over ranks of the local losses equals the loss of the whole.
  The same under every layout without accumulation; with it, early micro-batches see the counts so far.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from moetrain.config import BalanceConfig
from moetrain.ops.slots import count_experts
from moetrain.parallel.collectives import sum_over
from moetrain.parallel.mesh import Mesh
from moetrain.types import LossTerms, Routing


def balance_loss(share_XE: Tensor, probs_XE: Tensor) -> Tensor:
    """Scalar ``mean_x E * sum_e share * probs``; shares and mean probabilities over X token sets, rows summing to 1."""
    return probs_XE.shape[-1] * (share_XE * probs_XE).sum(-1).mean()


def z_loss(logits_TE: Tensor) -> Tensor:
    """Scalar mean squared log-partition of the router's logits."""
    return torch.logsumexp(logits_TE, dim=-1).square().mean()


def weighted(losses: LossTerms, config: BalanceConfig) -> Tensor:
    """Scalar: the losses times their coefficients, to be added to the language loss."""
    return (
        config.balance_coef * losses.balance
        + config.device_coef * losses.device
        + config.communication_coef * losses.communication
        + config.importance_coef * losses.importance
        + config.z_coef * losses.z
        + losses.own
    )


class Balance(nn.Module):
    """Computes both losses of one layer; coefficients are applied where all layers are known."""

    def __init__(self, config: BalanceConfig, num_experts: int, mesh: Mesh) -> None:
        super().__init__()
        self.scope, self.num_experts, self.mesh = config.scope, num_experts, mesh

    def forward(self, routing: Routing, num_sequences: int, earlier_E: Tensor) -> LossTerms:
        """earlier_E: int64 counts of this rank's earlier micro-batches of the step (read under ``global_batch``
        only).
        """
        share, probs = self._share_and_probs(routing, num_sequences, earlier_E)
        zero = LossTerms.zeros(routing.logits_TE.device)
        own = zero.own if routing.own_loss is None else routing.own_loss
        return replace(zero, balance=balance_loss(share, probs), z=z_loss(routing.logits_TE), own=own)

    def _share_and_probs(self, routing: Routing, num_sequences: int, earlier_E: Tensor) -> tuple[Tensor, Tensor]:
        if self.scope == "sequence":
            chosen = routing.expert_TK.reshape(num_sequences, -1)
            counts = torch.zeros(num_sequences, self.num_experts, dtype=torch.int64, device=chosen.device)
            counts.scatter_add_(1, chosen, torch.ones_like(chosen))
            probs = routing.probs_TE.view(num_sequences, -1, self.num_experts).mean(1)
        else:
            counts = count_experts(routing.expert_TK, self.num_experts).unsqueeze(0)
            if self.scope == "global_batch":
                counts = sum_over(counts + earlier_E, self.mesh.world_group)
            probs = routing.probs_TE.mean(0, keepdim=True)
        return counts / counts.sum(-1, keepdim=True), probs
