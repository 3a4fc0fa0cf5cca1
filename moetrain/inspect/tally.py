"""Exact counts of one MoE layer over several micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.inspect.observe import Seen
from moetrain.ops.slots import count_experts

NUM_PARTS = 8


class Tally:
    """All int64, of assignments before dropping if not said otherwise.

    token_UE: by token id (place in ``ids_U``). domain_DE: by the domain of the token, D of them. occurred_U: how often
    the layer was given that id. position_PE: by eighth of the sequence. together_EE: tokens that chose both.
    assigned_E, kept_E: before and after dropping. entropy: of the router's probabilities in nats, summed over tokens.
    """

    def __init__(self, num_experts: int, ids_U: Tensor, context: int, num_domains: int = 0) -> None:
        """ids_U: every token id that may occur, ascending."""
        self.num_experts, self.ids_U, self.context = num_experts, ids_U, context
        self.token_UE = torch.zeros(len(ids_U), num_experts, dtype=torch.int64)
        self.domain_DE = torch.zeros(num_domains, num_experts, dtype=torch.int64)
        self.occurred_U = torch.zeros(len(ids_U), dtype=torch.int64)
        self.position_PE = torch.zeros(NUM_PARTS, num_experts, dtype=torch.int64)
        self.together_EE = torch.zeros(num_experts, num_experts, dtype=torch.int64)
        self.assigned_E = torch.zeros(num_experts, dtype=torch.int64)
        self.kept_E = torch.zeros(num_experts, dtype=torch.int64)
        self.entropy, self.num_tokens = 0.0, 0

    def add(self, seen: Seen, domain_BS: Tensor | None = None) -> None:
        """domain_BS: of all tokens of the micro-batch, where the corpus names domains."""
        routing, kept_TK = seen.placement.routing, seen.placement.kept_TK.cpu()
        expert_TK, probs_TE = routing.expert_TK.cpu(), routing.probs_TE.cpu().double()
        valid_TK = torch.ones_like(kept_TK) if routing.valid_TK is None else routing.valid_TK.cpu()
        chosen_TE = torch.zeros(len(expert_TK), self.num_experts, dtype=torch.int64)
        chosen_TE.scatter_(1, expert_TK, valid_TK.to(torch.int64))  # experts are distinct within a row
        place_T = torch.searchsorted(self.ids_U, seen.given.tokens_BS.flatten().cpu())
        part_T = seen.place_T.cpu() % self.context * NUM_PARTS // self.context
        self.token_UE.index_add_(0, place_T, chosen_TE)
        if domain_BS is not None:
            self.domain_DE.index_add_(0, domain_BS.flatten()[seen.place_T.cpu()], chosen_TE)
        self.occurred_U.index_add_(0, place_T, torch.ones_like(place_T))
        self.position_PE.index_add_(0, part_T, chosen_TE)
        self.together_EE += (chosen_TE.t().double() @ chosen_TE.double()).to(torch.int64)
        self.assigned_E += chosen_TE.sum(0)
        self.kept_E += count_experts(expert_TK, self.num_experts, kept_TK)
        self.entropy += float(torch.special.entr(probs_TE).sum())
        self.num_tokens += len(expert_TK)
