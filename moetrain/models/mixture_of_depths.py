"""Mixture of Depths (Raposo et al. 2024, arXiv 2404.02258): a block that most tokens pass by.

Every token has a score ``r = x w``. In training the C best tokens of each sequence go through the block, attention
among themselves included, with their own positions; they become ``x + r * f(x)``, with f all that the block adds, and
the others stay x. Which tokens are the best is known only when the whole sequence is: a later token can push an earlier
one out. So in evaluation a token goes through where a small predictor, which sees that token alone and is trained to
tell the C best from the others, says so. Evaluation is causal; the number of tokens that go through is then
not fixed, and another one for each sequence: those of a micro-batch are fed as one row, so that router losses of each
sequence by itself (balance.scope = sequence) are of the micro-batch then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moetrain.config import Config, ModelConfig
from moetrain.models.block import Block, BlockOutput
from moetrain.moe.replay import Replay
from moetrain.ops.init import Draw
from moetrain.ops.kernels import Kernels
from moetrain.ops.timeline import Timeline
from moetrain.parallel.mesh import Mesh


def is_depth_block(model: ModelConfig, index: int) -> bool:
    """Whether tokens may pass by block ``index``: the last block of every ``depth_every`` ones."""
    return model.depth_every > 0 and (index + 1) % model.depth_every == 0


def num_through(model: ModelConfig, num_tokens: int) -> int:
    """C, how many tokens of a sequence of ``num_tokens`` go through a routed block in training."""
    exact = model.depth_fraction * num_tokens
    return max(1, math.ceil(exact - 1e-9))  # 0.07 * 100 is a little more than 7


@dataclass(frozen=True)
class Depth:
    """Which tokens should go through, and with what weight.

    score_BS: fp32, r, differentiable. best_BC: int64 positions of the C highest scores, ascending. predicted_BS: bool,
    what the predictor says. loss: scalar, the predictor's mean binary cross-entropy in nats.
    """

    score_BS: Tensor
    best_BC: Tensor
    predicted_BS: Tensor
    loss: Tensor


class DepthRouter(nn.Module):
    """Scores ``x w`` and a linear predictor ``x v + b`` of who is among the best; no gradient goes from it to x."""

    def __init__(self, model: ModelConfig, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self.gate = nn.Parameter(torch.empty(1, model.dim, device=device))
        self.predictor = nn.Parameter(torch.empty(1, model.dim, device=device))
        self.predictor_bias = nn.Parameter(torch.zeros(1, device=device))

    def init_weights(self, draw: Draw, std: float) -> None:
        draw.normal_(self.gate, "gate", std)
        draw.normal_(self.predictor, "predictor", std)

    def forward(self, x_BSD: Tensor, replay: Replay) -> Depth:
        linear, num_best = torch.nn.functional.linear, num_through(self.model, x_BSD.shape[1])
        score_BS = linear(x_BSD.float(), self.gate.float()).squeeze(-1)
        best_BC = replay.once("depth", lambda: best_positions(score_BS, num_best))
        logit_BS = linear(x_BSD.detach().float(), self.predictor.float(), self.predictor_bias.float()).squeeze(-1)
        is_best_BS = torch.zeros_like(logit_BS).scatter_(1, best_BC, 1.0)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logit_BS, is_best_BS)
        predicted_BS = replay.once("depth_predicted", lambda: logit_BS.detach() > 0)
        return Depth(score_BS, best_BC, predicted_BS, loss)


class DepthBlock(Block):
    """A block with the parameters of any other, and a router that decides which tokens go through it."""

    def __init__(
        self, config: Config, index: int, mesh: Mesh, timeline: Timeline, kernels: Kernels, vocab_size: int
    ) -> None:
        super().__init__(config, index, mesh, timeline, kernels, vocab_size)
        self.depth = DepthRouter(config.model, mesh.device)

    def init_weights(self, draw: Draw, std: float, std_out: float) -> None:
        super().init_weights(draw, std, std_out)
        self.depth.init_weights(draw.of("depth"), std)

    def forward(
        self,
        x_BSD: Tensor,
        tokens_BS: Tensor,
        tables_2Sd: Tensor,
        mask_B1SS: Tensor | None,
        replay: Replay,
        domain_BS: Tensor | None = None,
    ) -> BlockOutput:
        depth = self.depth(x_BSD, replay)
        if self.training:
            return self._best(depth, x_BSD, tokens_BS, tables_2Sd, mask_B1SS, replay, domain_BS)
        return self._predicted(depth, x_BSD, tokens_BS, tables_2Sd, mask_B1SS, replay)

    def _best(
        self,
        depth: Depth,
        x_BSD: Tensor,
        tokens_BS: Tensor,
        tables_2Sd: Tensor,
        mask_B1SS: Tensor | None,
        replay: Replay,
        domain_BS: Tensor | None,
    ) -> BlockOutput:
        """The C best of each sequence, and nothing else: shapes are those of a shorter sequence."""
        best_BC = depth.best_BC
        best_BCD = best_BC.unsqueeze(-1).expand(-1, -1, x_BSD.shape[2])
        x_BCD = x_BSD.gather(1, best_BCD)
        tables_2B1Cd = tables_2Sd[:, best_BC].unsqueeze(2)
        attended_BCD = self.attend(x_BCD, tables_2B1Cd, None if mask_B1SS is None else mask_among(mask_B1SS, best_BC))
        domain_BC = None if domain_BS is None else domain_BS.gather(1, best_BC)
        fed = self.feed(x_BCD + attended_BCD, tokens_BS.gather(1, best_BC), replay, domain_BC)
        score_BC1 = depth.score_BS.gather(1, best_BC).unsqueeze(-1)
        added_BCD = (score_BC1 * (attended_BCD + fed.hidden_BSD)).to(x_BSD.dtype)
        return BlockOutput(x_BSD.scatter_add(1, best_BCD, added_BCD), fed.losses, depth.loss)

    def _predicted(
        self,
        depth: Depth,
        x_BSD: Tensor,
        tokens_BS: Tensor,
        tables_2Sd: Tensor,
        mask_B1SS: Tensor | None,
        replay: Replay,
    ) -> BlockOutput:
        """Attention over all tokens, of which only those that go through are looked at; they alone are fed.

        Their number is read by the host. With none of them on a rank the feed-forward still runs, on no tokens, since
        other ranks need this one's experts.
        """
        attended_BSD = self.attend(x_BSD, tables_2Sd, mask_of(depth.predicted_BS, mask_B1SS))
        row_N = depth.predicted_BS.flatten().nonzero().squeeze(1)
        attended_1ND = attended_BSD.flatten(0, 1)[row_N].unsqueeze(0)
        x_1ND = x_BSD.flatten(0, 1)[row_N].unsqueeze(0)
        fed = self.feed(x_1ND + attended_1ND, tokens_BS.flatten()[row_N].unsqueeze(0), replay)
        score_1N1 = depth.score_BS.flatten()[row_N].view(1, -1, 1)
        added_1ND = (score_1N1 * (attended_1ND + fed.hidden_BSD)).to(x_BSD.dtype)
        hidden_TD = x_BSD.flatten(0, 1).index_add(0, row_N, added_1ND.squeeze(0))
        losses = fed.losses if row_N.numel() else None  # zeros of no tokens would have part in the mean over layers
        return BlockOutput(hidden_TD.view_as(x_BSD), losses, depth.loss)


def best_positions(score_BS: Tensor, num_best: int) -> Tensor:
    """int64 [B, C], ascending: where the highest scores of each sequence are; ties go to the earlier token."""
    ranked_BS = score_BS.detach().sort(dim=-1, descending=True, stable=True).indices
    return ranked_BS[:, :num_best].sort(dim=-1).values


def mask_among(mask_B1SS: Tensor, position_BC: Tensor) -> Tensor:
    """bool [B, 1, C, C]: a mask's rows and columns of the tokens at those positions."""
    num_tokens = mask_B1SS.shape[-1]
    rows_B1CS = mask_B1SS.gather(2, position_BC[:, None, :, None].expand(-1, 1, -1, num_tokens))
    return rows_B1CS.gather(3, position_BC[:, None, None, :].expand(-1, 1, position_BC.shape[1], -1))


def mask_of(through_BS: Tensor, mask_B1SS: Tensor | None) -> Tensor:
    """bool [B, 1, S, S]: who may look at whom, when only some tokens can be looked at. Rows of other tokens, which
    nobody reads, may allow nothing.
    """
    num_tokens = through_BS.shape[1]
    causal_SS = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=through_BS.device).tril()
    return (causal_SS if mask_B1SS is None else mask_B1SS) & through_BS[:, None, None, :]
