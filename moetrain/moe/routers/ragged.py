"""A ``Routing`` from a set of experts per token, whatever its size."""

from __future__ import annotations

from torch import Tensor

from moetrain.moe.replay import Replay
from moetrain.types import Routing


def ragged_routing(
    logits_TE: Tensor,
    probs_TE: Tensor,
    score_TE: Tensor,
    chosen_TE: Tensor,
    replay: Replay,
    own_loss: Tensor | None = None,
) -> Routing:
    """K = E: a row of ids is the chosen experts of a token, best first, then the others, which are no assignments.

    score_TE: fp32, what the weights are and what the order goes by, ties to the lower id. chosen_TE: bool, a decision,
    so it went through ``replay`` already.
    """
    expert_TK = replay.once("expert", lambda: _chosen_first(score_TE, chosen_TE))
    valid_TK = chosen_TE.gather(1, expert_TK)
    weight_TK = score_TE.gather(1, expert_TK).masked_fill(~valid_TK, 0.0)
    return Routing(logits_TE, probs_TE, expert_TK, weight_TK, valid_TK, own_loss=own_loss)


def _chosen_first(score_TE: Tensor, chosen_TE: Tensor) -> Tensor:
    order_TE = score_TE.detach().masked_fill(~chosen_TE, float("-inf"))
    return order_TE.sort(dim=-1, descending=True, stable=True).indices
