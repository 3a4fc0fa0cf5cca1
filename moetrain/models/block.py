"""One block of the decoder: attention, then a dense or an MoE feed-forward."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from moetrain.config import Config, ModelConfig
from moetrain.models.attention import Attention, RMSNorm
from moetrain.moe.experts import FeedForward, activation_of
from moetrain.moe.layer import MoELayer
from moetrain.moe.replay import Replay
from moetrain.ops.init import Draw
from moetrain.ops.kernels import Kernels
from moetrain.ops.timeline import Timeline
from moetrain.parallel.mesh import Mesh
from moetrain.types import LossTerms


def is_moe_layer(model: ModelConfig, index: int) -> bool:
    """Whether layer ``index`` is an MoE layer under the pattern of ``first_dense`` and ``moe_every``."""
    return index >= model.first_dense and (index - model.first_dense) % model.moe_every == 0


@dataclass(frozen=True)
class BlockOutput:
    """hidden_BSD, the router losses of an MoE layer (None of a dense one, or of no tokens), and the loss of the
    predictor of a block that tokens may pass by (None of the others).
    """

    hidden_BSD: Tensor
    losses: LossTerms | None
    depth: Tensor | None = None


class Block(nn.Module):
    """Pre-norm: attention, then a dense or an MoE feed-forward; both add to the residual."""

    def __init__(
        self, config: Config, index: int, mesh: Mesh, timeline: Timeline, kernels: Kernels, vocab_size: int
    ) -> None:
        super().__init__()
        model = config.model
        self.timeline = timeline
        self.attention_norm = RMSNorm(model.dim, model.norm_eps, mesh.device)
        self.attention = Attention(model, mesh.device, kernels)
        self.ffn_norm = RMSNorm(model.dim, model.norm_eps, mesh.device)
        self.is_moe = is_moe_layer(model, index)
        if self.is_moe:
            self.moe = MoELayer(config, mesh, timeline, kernels, vocab_size, index)
        else:
            self.ffn = FeedForward(activation_of(config.experts), model.dim, model.ffn_dim, mesh.device, kernels)

    def init_weights(self, draw: Draw, std: float, std_out: float) -> None:
        self.attention.init_weights(draw.of("attention"), std, std_out)
        if self.is_moe:
            self.moe.init_weights(draw.of("moe"), std, std_out)
        else:
            self.ffn.init_weights(draw.of("ffn"), std, std_out)

    def forward(
        self,
        x_BSD: Tensor,
        tokens_BS: Tensor,
        tables_2Sd: Tensor,
        mask_B1SS: Tensor | None,
        replay: Replay,
        domain_BS: Tensor | None = None,
    ) -> BlockOutput:
        x_BSD = x_BSD + self.attend(x_BSD, tables_2Sd, mask_B1SS)
        fed = self.feed(x_BSD, tokens_BS, replay, domain_BS)
        return BlockOutput(x_BSD + fed.hidden_BSD, fed.losses)

    def attend(self, x_BSD: Tensor, tables_2Sd: Tensor, mask_B1SS: Tensor | None) -> Tensor:
        """What attention adds to x_BSD."""
        through = self.timeline.through
        normed_BSD = through(self.attention_norm(x_BSD), "rest", "attention")
        return through(self.attention(normed_BSD, tables_2Sd, mask_B1SS), "attention", "rest")

    def feed(self, x_BSD: Tensor, tokens_BS: Tensor, replay: Replay, domain_BS: Tensor | None = None) -> BlockOutput:
        """What the feed-forward adds to x_BSD."""
        normed_BSD = self.ffn_norm(x_BSD)
        if not self.is_moe:
            return BlockOutput(self.ffn(normed_BSD), None)
        out = self.moe(normed_BSD.flatten(0, 1), tokens_BS, replay, domain_BS)
        return BlockOutput(out.hidden_TD.view_as(x_BSD), out.losses)
