"""The routing walk: token choice with a capacity, step by step, by the plainest tensor operations there are.

GShard (Lepikhin et al. 2020), algorithm 1, with k choices. The layer itself sorts instead of summing over one-hot rows;
both give the same slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, one_hot

from moetrain.inspect.observe import Seen
from moetrain.moe.capacity import renormalised
from moetrain.moe.experts import Experts, one_row_each
from moetrain.moe.routers import scoring
from moetrain.moe.routers.token_choice import TokenChoiceRouter
from moetrain.ops.slots import queue_positions_by_cumsum
from moetrain.types import ConfigError, Dispatched, Problem, Routing

WALKED = "the walk is for the token-choice routers without zero-compute experts, served choice by choice"


@dataclass(frozen=True, eq=False)
class Walk:
    """Every intermediate value. M = K*T assignments, choice-major: all first choices before all second ones.

    selection_TE: what the top k are taken from (-inf: not allowed). weight_TK: of the chosen. one_hot_TKE,
    served_ME, position_ME (the cumulative sum less 1), slot_TK: int64. slots: per expert, the longest queue where
    ``dropless``. kept_weight_TK: the weights after capacity, scaled up over what was kept where ``renormalised``.
    weight_TEC: the weight of each token for each slot of each expert, 0 where it has none. back_ECD: what the
    experts give for what lies in their slots. out_TD: what comes back, the sum over experts and slots.
    """

    words: tuple[str, ...]
    layer: int
    settings: scoring.Settings
    logits_TE: Tensor
    selection_TE: Tensor
    expert_TK: Tensor
    weight_TK: Tensor
    one_hot_TKE: Tensor
    served_ME: Tensor
    position_ME: Tensor
    slot_TK: Tensor
    kept_TK: Tensor
    slots: int
    dropless: bool
    renormalised: bool
    kept_weight_TK: Tensor
    weight_TEC: Tensor
    back_ECD: Tensor
    out_TD: Tensor


def walk(seen: Seen, words: Sequence[str]) -> Walk:
    """Take what one layer saw of one sequence through the steps again. Raises ConfigError for other ways of routing."""
    router, x_TD = _walkable(seen), seen.given.x_TD
    logits_TE, selection_TE, expert_TK, weight_TK = _choose(router, x_TD)
    num_experts = router.site.num_experts
    num_tokens, top_k = expert_TK.shape
    one_hot_TKE = one_hot(expert_TK, num_experts)
    served_ME = one_hot_TKE.permute(1, 0, 2).reshape(top_k * num_tokens, num_experts)
    slot_TK = queue_positions_by_cumsum(expert_TK, num_experts)
    capacity = seen.placement.capacity
    slots = int(slot_TK.max()) + 1 if capacity is None else capacity
    kept_TK = slot_TK < slots
    is_renormalised = capacity is not None and seen.capacity.config.renormalise
    routing = Routing(logits_TE, logits_TE.softmax(-1), expert_TK, weight_TK)
    kept_weight_TK = renormalised(routing, kept_TK).weight_TK if is_renormalised else weight_TK * kept_TK
    held_TKEC = one_hot_TKE.unsqueeze(-1) * _slot_rows(slot_TK, slots).unsqueeze(2)
    weight_TEC = (kept_weight_TK[:, :, None, None] * held_TKEC).sum(1)
    on_input = router.settings.weight_on == "input"
    back_ECD, out_TD = _there_and_back(seen.experts, on_input, x_TD, held_TKEC.sum(1), weight_TEC)
    return Walk(
        words=tuple(words),
        layer=seen.layer,
        settings=router.settings,
        logits_TE=logits_TE,
        selection_TE=selection_TE,
        expert_TK=expert_TK,
        weight_TK=weight_TK,
        one_hot_TKE=one_hot_TKE,
        served_ME=served_ME,
        position_ME=served_ME.cumsum(0) - 1,
        slot_TK=slot_TK,
        kept_TK=kept_TK,
        slots=slots,
        dropless=capacity is None,
        renormalised=is_renormalised,
        kept_weight_TK=kept_weight_TK,
        weight_TEC=weight_TEC,
        back_ECD=back_ECD,
        out_TD=out_TD,
    )


def _walkable(seen: Seen) -> TokenChoiceRouter:
    router, config = seen.router, seen.capacity.config
    if not isinstance(router, TokenChoiceRouter) or router.settings.zero_experts:
        name = type(router).__name__
        raise ConfigError([Problem("--walk", name, WALKED, "look at the choices with --text instead")])
    choice_major = config.priority == "choice_major" or (config.priority == "random" and not seen.capacity.training)
    if not choice_major and seen.placement.capacity is not None:
        fix = "look at the slots with --text instead"
        raise ConfigError([Problem("capacity.priority", config.priority, WALKED, fix)])
    return router


@torch.no_grad()
def _choose(router: TokenChoiceRouter, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, what is selected from, the chosen experts and their weights; no noise."""
    settings = router.settings
    bias_E = None if router.gate_bias is None else router.gate_bias.float()
    logits_TE = linear(x_TD.float(), router.gate.float(), bias_E) * settings.logit_scale
    logits_TE = scoring.softcapped(logits_TE, settings.logit_softcap)
    score_TE = scoring.scores(logits_TE, settings.score)
    selection_TE = score_TE if settings.select == "scores" else logits_TE
    if router.bias_E is not None:
        selection_TE = selection_TE + router.bias_E.float()
    groups = settings.num_groups, settings.top_groups, settings.group_score
    selection_TE = scoring.within_best_groups(selection_TE, *groups)
    expert_TK = scoring.best_experts(selection_TE, settings.top_k)
    return logits_TE, selection_TE, expert_TK, scoring.combine_weights(logits_TE, score_TE, expert_TK, settings)


def _slot_rows(slot_TK: Tensor, slots: int) -> Tensor:
    """int64 [T, K, C]: one-hot, all zero for a slot beyond the last."""
    return (slot_TK.unsqueeze(-1) == torch.arange(slots, device=slot_TK.device)).to(torch.int64)


@torch.no_grad()
def _there_and_back(
    experts: Experts, on_input: bool, x_TD: Tensor, held_TEC: Tensor, weight_TEC: Tensor
) -> tuple[Tensor, Tensor]:
    """Every slot filled with its token or with zeros, the experts' answers [E, C, D], and their sums [T, D].

    on_input: weights multiply what experts are given instead of what they give.
    """
    there_TEC, back_TEC = (weight_TEC, held_TEC.float()) if on_input else (held_TEC.float(), weight_TEC)
    sent_ECD = torch.einsum("tec,td->ecd", there_TEC, x_TD)
    num_experts, slots, _ = sent_ECD.shape
    ends_e, sent_RD = (
        torch.arange(1, num_experts + 1, dtype=torch.int32, device=x_TD.device) * slots,
        sent_ECD.flatten(0, 1),
    )
    back_ECD = experts(Dispatched(sent_RD, one_row_each(sent_RD), None, ends_e, slots, 0)).view_as(sent_ECD)
    return back_ECD, torch.einsum("tec,ecd->td", back_TEC, back_ECD)
