"""Router losses, in units where an even load is 1.0 (``importance``: 0.0), one value per layer.

Counts are taken BEFORE dropping and carry no gradient; entries that are no assignment are not counted. With f_e the
share of assignments that went to expert e, P_e the mean router probability, over a set of T tokens:

- balance: ``E * sum_e f_e * P_e`` (Switch, Fedus et al. 2021, with f over all k choices).
- device: ``D * sum_d f_d * P_d`` with f and P summed over the experts of group d of D (DeepSeek-V2, arXiv 2405.04434;
  its f' is a mean over the group of counts normalised to mean 1, which is the same number).
- communication: ``D * sum_d c_d / (M T) * P_d`` with c_d the tokens that have an expert in group d, M the groups that a
  token has experts in at most (DeepSeek-V2). 1.0 when even and every token reaches M groups, less when they reach
  fewer: that is what it rewards.
- importance: squared coefficient of variation of the experts' summed combine weights, the variance being a mean over E
  (Shazeer et al. 2017).
- z: ``mean_t logsumexp(l_t)^2`` over the E experts (ST-MoE, Zoph et al. 2022); zero experts have no part in it.

The scope is the set of tokens that they are taken over (z: always all tokens, one by one):

- ``micro_batch``: the tokens of this rank; what a micro-batch is, and so the value, depends on the layout.
- ``sequence``: each sequence by itself, then the mean; the same under every layout, in value and in gradient.
- ``global_batch``: f over all ranks and all micro-batches of the step so far, P over this rank. f carries no gradient,
  so one all-reduce of integers is enough, and the mean over ranks of the local losses equals the loss of the whole.
  The same under every layout without accumulation; with it, early micro-batches see the counts so far. communication
  and importance are over all ranks too, micro-step by micro-step.

A set without tokens has no imbalance: every loss of it is 0.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from moetrain.config import BalanceConfig
from moetrain.ops.spread import cv_squared, summed_weights
from moetrain.parallel.collectives import sum_over
from moetrain.parallel.mesh import Mesh
from moetrain.types import LossTerms, Routing


def balance_loss(share_XE: Tensor, probs_XE: Tensor) -> Tensor:
    """Scalar ``mean_x E * sum_e share * probs``; shares and mean probabilities over X token sets, rows summing to 1."""
    return probs_XE.shape[-1] * (share_XE * probs_XE).sum(-1).mean()


def z_loss(logits_TE: Tensor) -> Tensor:
    """Scalar mean squared log-partition of the router's logits; 0 of no tokens."""
    return torch.logsumexp(logits_TE, dim=-1).square().sum() / max(logits_TE.shape[0], 1)


def weighted(losses: LossTerms, config: BalanceConfig) -> Tensor:
    """Scalar: the losses times their coefficients, to be added to the language loss. ``config`` is in our units."""
    assert config.units == "moetrain", "see moetrain.moe.units"
    return (
        config.balance_coef * losses.balance
        + config.device_coef * losses.device
        + config.communication_coef * losses.communication
        + config.importance_coef * losses.importance
        + config.z_coef * losses.z
        + losses.own
    )


class Balance(nn.Module):
    """Computes the losses of one layer; coefficients are applied where all layers are known.

    balance and z are always computed, since they are also watched; the others where their coefficient is not zero.
    """

    def __init__(self, config: BalanceConfig, num_experts: int, mesh: Mesh) -> None:
        super().__init__()
        self.config, self.num_experts, self.mesh = config, num_experts, mesh
        self.num_devices = config.num_devices or mesh.ep_size
        assert num_experts % self.num_devices == 0, (num_experts, self.num_devices)

    def forward(self, routing: Routing, num_sequences: int, earlier_E: Tensor) -> LossTerms:
        """earlier_E: int64 counts of this rank's earlier micro-batches of the step (read under ``global_batch``
        only).
        """
        config, num_sets = self.config, num_sequences if self.config.scope == "sequence" else 1
        share_XE = self._share(routing, num_sets, earlier_E)
        probs_XnE = routing.probs_TE.view(num_sets, -1, self.num_experts)
        probs_XE = probs_XnE.sum(1) / max(probs_XnE.shape[1], 1)
        losses = replace(
            LossTerms.zeros(probs_XE.device), balance=balance_loss(share_XE, probs_XE), z=z_loss(routing.logits_TE)
        )
        if routing.own_loss is not None:
            losses = replace(losses, own=routing.own_loss)
        if config.device_coef:
            losses = replace(losses, device=balance_loss(self._by_device(share_XE), self._by_device(probs_XE)))
        if config.communication_coef:
            sent_XD = self._sent_share(routing, num_sets)
            losses = replace(losses, communication=balance_loss(sent_XD, self._by_device(probs_XE)))
        if config.importance_coef:
            losses = replace(losses, importance=cv_squared(self._summed_weights(routing, num_sets)))
        return losses

    def _share(self, routing: Routing, num_sets: int, earlier_E: Tensor) -> Tensor:
        """Each expert's share of the assignments of a set, [X, E]."""
        counts_XE = _counts(routing.expert_TK, routing.valid_TK, self.num_experts, num_sets)
        if self.config.scope == "global_batch":
            counts_XE = sum_over(counts_XE + earlier_E, self.mesh.world_group)
        return counts_XE / counts_XE.sum(-1, keepdim=True).clamp(min=1)

    def _by_device(self, x_XE: Tensor) -> Tensor:
        return x_XE.unflatten(-1, (self.num_devices, -1)).sum(-1)

    def _sent_share(self, routing: Routing, num_sets: int) -> Tensor:
        """Tokens of a set with an expert in each group, by M times the tokens of the set, [X, D]."""
        device_TK = routing.expert_TK // (self.num_experts // self.num_devices)
        num_tokens, top_k = device_TK.shape
        ones_TK = torch.ones_like(device_TK) if routing.valid_TK is None else routing.valid_TK.to(torch.int64)
        sent_TD = torch.zeros(num_tokens, self.num_devices, dtype=torch.int64, device=device_TK.device)
        sent_TD = sent_TD.scatter_add_(1, device_TK, ones_TK).clamp(max=1)
        sent_XD = sent_TD.view(num_sets, -1, self.num_devices).sum(1)
        if self.config.scope == "global_batch":
            sent_XD, num_tokens = sum_over(sent_XD, self.mesh.world_group), num_tokens * self.mesh.world_size
        at_most = self.config.devices_per_token or min(top_k, self.num_devices)
        return sent_XD / (at_most * max(num_tokens, 1) / num_sets)

    def _summed_weights(self, routing: Routing, num_sets: int) -> Tensor:
        """Combine weights of each expert over a set, [X, E].

        Over all ranks the value is that of the whole; the gradient of this rank's part is multiplied by the ranks,
        since gradients are averaged over them afterwards.
        """
        mine_XE = summed_weights(routing.expert_TK, routing.weight_TK, self.num_experts, num_sets)
        if self.config.scope != "global_batch":
            return mine_XE
        return sum_over(mine_XE, self.mesh.world_group) + self.mesh.world_size * (mine_XE - mine_XE.detach())


def _counts(expert_TK: Tensor, valid_TK: Tensor | None, num_experts: int, num_sets: int) -> Tensor:
    """Assignments of each set of tokens, int64 [X, E]."""
    ones_TK = torch.ones_like(expert_TK) if valid_TK is None else valid_TK.to(torch.int64)
    counts_XE = torch.zeros(num_sets, num_experts, dtype=torch.int64, device=expert_TK.device)
    return counts_XE.scatter_add_(1, expert_TK.reshape(num_sets, -1), ones_TK.reshape(num_sets, -1))
