"""What one MoE layer did besides its load: drops by choice and by position, rows received, how the router feels.

Everything is a sum over tokens, so that it can be added up over micro-batches and ranks; means are taken at the end,
in one place (moetrain/monitor/window.py). Recorded in training forwards only, counted once by ``commit``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moetrain.moe.counted import Counted
from moetrain.types import Dispatched, Gauges, Placement

NUM_POSITIONS = 8


class LayerGauges(Counted[Gauges]):
    """Gauges of one layer since the last ``take``, on its device; nothing is read by the host."""

    def __init__(self) -> None:
        super().__init__(Gauges.plus)

    @torch.no_grad()
    def record(self, placement: Placement, arrived: Sequence[Dispatched], num_sequences: int) -> None:
        """Assign the sums of this micro-batch. arrived: all parts of what this rank's experts got."""
        routing = placement.routing
        valid_TK = torch.ones_like(placement.kept_TK) if routing.valid_TK is None else routing.valid_TK
        both_2TK = torch.stack([valid_TK, placement.kept_TK]).to(torch.int64)
        probs_TE, logits_TE = routing.probs_TE.detach(), routing.logits_TE.detach()
        peak_T = logits_TE.abs().amax(-1)
        self._latest = Gauges(
            choice_2K=both_2TK.sum(1),
            position_2P=_by_position(both_2TK.sum(2), num_sequences),
            received=torch.stack([sent.ends_e[-1] for sent in arrived]).sum(),
            travelled=both_2TK.new_full((), sum(sent.num_travelled for sent in arrived)),
            tokens=probs_TE.new_full((), probs_TE.shape[0], dtype=torch.float64),
            entropy=torch.special.entr(probs_TE).sum(dtype=torch.float64),
            confidence=probs_TE.amax(-1).sum(dtype=torch.float64),
            logit_square=logits_TE.square().mean(-1).sum(dtype=torch.float64),
            logit_peak=torch.cat([peak_T, peak_T.new_zeros(1)]).max().double(),
        )


def _by_position(counts_2T: Tensor, num_sequences: int) -> Tensor:
    """Sums over the parts of the sequence, first to last, [2, P]; sequences of equal length lie one after another."""
    num_tokens = counts_2T.shape[1]
    length = max(num_tokens // num_sequences, 1)
    part_T = torch.arange(num_tokens, device=counts_2T.device) % length * NUM_POSITIONS // length
    sums_2P = torch.zeros(2, NUM_POSITIONS, dtype=torch.int64, device=counts_2T.device)
    return sums_2P.scatter_add_(1, part_T.expand(2, -1), counts_2T)
