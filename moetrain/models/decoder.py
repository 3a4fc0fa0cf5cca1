"""A decoder with a pattern of dense and MoE layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moetrain.checks import traits_of
from moetrain.config import Config
from moetrain.models.attention import RMSNorm, document_mask, rotary_tables
from moetrain.models.block import Block
from moetrain.models.mixture_of_depths import DepthBlock, is_depth_block
from moetrain.moe.adapt import adapt
from moetrain.moe.balance import weighted
from moetrain.moe.layer import MoELayer
from moetrain.moe.replay import Replay
from moetrain.moe.units import in_our_units
from moetrain.ops.init import Draw
from moetrain.ops.kernels import Kernels, make_kernels
from moetrain.ops.timeline import Timeline
from moetrain.parallel.mesh import Mesh
from moetrain.types import Batch, Gauges, LoadCounts, LossTerms, ModelOutput

COLLAPSE = 20.0
"""Of two experts' logits over all others: enough that neither balance loss nor z-loss has a gradient to speak of at the
others.
"""


class Decoder(nn.Module):
    """Tokens in, loss out. Parameters are fp32 on the mesh's device, a function of (seed, name, global expert id)."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        vocab_size: int,
        timeline: Timeline | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        """Without a ``timeline`` nothing is timed; without ``kernels`` torch's own are used."""
        super().__init__()
        model = config.model
        self.config, self.mesh, self.context = config, mesh, model.context
        self.timeline = timeline or Timeline(mesh.device, enabled=False)
        self.kernels = kernels or make_kernels(mesh.device, "torch")
        self.embedding = nn.Embedding(vocab_size, model.dim, device=mesh.device)
        kinds = [DepthBlock if is_depth_block(model, i) else Block for i in range(model.num_layers)]
        blocks = [kind(config, i, mesh, self.timeline, self.kernels, vocab_size) for i, kind in enumerate(kinds)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(model.dim, model.norm_eps, mesh.device)
        if not model.tied_embeddings:
            self.head = nn.Parameter(torch.empty(vocab_size, model.dim, device=mesh.device))
        tables = rotary_tables(model.head_dim, model.context, model.rope_theta, mesh.device)
        self.register_buffer("rotary", tables, persistent=False)
        self.balance = in_our_units(
            config.balance,
            top_k=traits_of(config).experts_per_token,
            num_experts=config.experts.num_experts,
            num_moe_layers=len(self.moe_layers()),
        )
        self._init_weights(Draw(config.run.seed))

    def _init_weights(self, draw: Draw) -> None:
        std = self.config.model.init_std
        std_out = std / math.sqrt(2 * self.config.model.num_layers)
        draw.normal_(self.embedding.weight, "embedding.weight", std)
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            block.init_weights(draw.of(f"blocks.{index}"), std, std_out)
        if not self.config.model.tied_embeddings:
            draw.normal_(self.head, "head", std)
        if self.config.debug.collapsed_router:
            for layer in self.moe_layers():
                layer.router.get_parameter("gate_bias").detach()[:2] = COLLAPSE

    def forward(self, batch: Batch) -> ModelOutput:
        """One micro-batch -> its loss: mean cross-entropy in nats, and the router losses with their coefficients."""
        mask_B1SS = None if batch.document_BS is None else document_mask(batch.document_BS)
        hidden_BSD, losses = self._hidden(batch.tokens_BS, mask_B1SS, batch.domain_BS)
        hidden_BSD = self.timeline.through(hidden_BSD, "rest", "vocabulary")
        logits_TV = self._project(hidden_BSD.flatten(0, 1)).float()
        lm = torch.nn.functional.cross_entropy(logits_TV, batch.targets_BS.flatten())
        lm = self.timeline.through(lm, "vocabulary", "rest")
        loss = lm + weighted(losses, self.balance) + self.config.model.depth_coef * losses.depth
        return ModelOutput(loss, lm, losses)

    def logits(self, tokens_BS: Tensor) -> Tensor:
        """[B, S] -> fp32 [B, S, V]."""
        hidden_BSD, _ = self._hidden(tokens_BS, None)
        return self._project(hidden_BSD).float()

    def _hidden(
        self, tokens_BS: Tensor, mask_B1SS: Tensor | None, domain_BS: Tensor | None = None
    ) -> tuple[Tensor, LossTerms]:
        x_BSD = self.embedding(tokens_BS)
        tables_2Sd = self.rotary[:, : tokens_BS.shape[1]]
        recompute = self.config.engine.recompute and torch.is_grad_enabled()
        terms, depths = [], []
        for block in self.blocks:
            args = (x_BSD, tokens_BS, tables_2Sd, mask_B1SS, Replay(), domain_BS)
            out = checkpoint(block, *args, use_reentrant=False) if recompute else block(*args)
            x_BSD = out.hidden_BSD
            terms += [] if out.losses is None else [out.losses]
            depths += [] if out.depth is None else [out.depth]
        losses = LossTerms.mean(terms) if terms else LossTerms.zeros(x_BSD.device)
        if depths:
            losses = replace(losses, depth=torch.stack(depths).mean())
        return self.norm(x_BSD), losses

    def _project(self, x_XD: Tensor) -> Tensor:
        weight_VD = self.embedding.weight if self.config.model.tied_embeddings else self.head
        return self.kernels.linear(x_XD, weight_VD)

    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers, in order of depth."""
        return [m for m in self.modules() if isinstance(m, MoELayer)]

    def moe_paths(self) -> list[str]:
        """What the MoE layers are called among the modules, in the same order."""
        return [name for name, m in self.named_modules() if isinstance(m, MoELayer)]

    def set_balance_coef(self, value: float) -> None:
        """From the next step on, in moetrain's units. On every rank alike, as all of these."""
        self.balance = replace(self.balance, balance_coef=value)

    def set_capacity_factor(self, value: float) -> None:
        """Of training, of all layers, from the next step on."""
        for layer in self.moe_layers():
            layer.capacity.factor_train = value

    def set_bias_rate(self, value: float) -> None:
        """Of the selection biases of all layers, from the next step on."""
        for layer in self.moe_layers():
            layer.router.bias_rate = value

    def set_shadows(self, hot_L: Sequence[tuple[int, ...]]) -> None:
        """Of each MoE layer the experts that are lent to all ranks of their EP group from the next step on."""
        for layer, hot in zip(self.moe_layers(), hot_L, strict=True):
            layer.shadows.put(hot)

    def expert_names(self) -> frozenset[str]:
        """Names of the parameters that are sharded over EP: stacked, dim 0 is the local expert."""
        return frozenset(name for name, _ in self.named_parameters() if ".moe.experts." in name)

    def count_domains(self, num_domains: int) -> None:
        """From now on count the load by the domain of the token too, of training batches that say it; 0: no more."""
        for layer in self.moe_layers():
            layer.count_domains(num_domains)

    def commit_load(self) -> None:
        """Count the expert load of the micro-batch just done; once after each training micro-batch."""
        for layer in self.moe_layers():
            layer.commit()

    def adapt_routers(self, moved: bool) -> None:
        """After an optimiser step and before ``take_load``: routers adjust what the gradient does not train.

        ``moved``: whether the weights were updated. Collective where the routers adapt.
        """
        layers = self.moe_layers()
        adapt([m.router for m in layers], [m.load for m in layers], [m.observed for m in layers], self.mesh, moved)

    def take_load(self) -> LoadCounts:
        """This rank's expert load since the last take; call it after every optimiser step."""
        layers = self.moe_layers()
        counts_L2E = torch.stack([layer.load.take() for layer in layers])
        by_domain = [layer.domains.take() for layer in layers if layer.domains is not None]
        domain_LDE = torch.stack(by_domain) if by_domain else None
        return LoadCounts(assigned_LE=counts_L2E[:, 0], kept_LE=counts_L2E[:, 1], domain_LDE=domain_LDE)

    def take_gauges(self) -> list[Gauges]:
        """This rank's gauges of each MoE layer since the last take."""
        return [layer.gauges.take() for layer in self.moe_layers()]

    def router_numbers(self) -> list[dict[str, float]]:
        """What each MoE layer's router keeps outside of the gradient, the same on every rank. Reads the device."""
        routers = [layer.router for layer in self.moe_layers()]
        return [{name: float(value) for name, value in router.numbers().items()} for router in routers]
