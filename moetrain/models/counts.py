"""Parameters, active parameters and FLOPs, from the configuration alone; a test holds them against the built module."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moetrain.checks import traits_of
from moetrain.config import Config
from moetrain.models.decoder import is_moe_layer
from moetrain.parts import build
from moetrain.types import RouterSite


@dataclass(frozen=True)
class SizeReport:
    """Parameters of the whole model (all experts), and what one token uses.

    active: total without the routed experts that a token does not visit. flops_per_token: forward and backward of one
    token in training at full context, multiply and add counted apart, causal attention counted as half of the square.
    """

    total: int
    active: int
    embedding: int
    routed: int
    flops_per_token: int

    @property
    def active_without_embedding(self) -> int:
        """Active parameters without the input embedding, as several papers quote them."""
        return self.active - self.embedding


def router_parameters(config: Config) -> int:
    """Trained parameters of one router, counted on a router without memory."""
    site = RouterSite(config.model.dim, config.experts.num_experts, 1, 0, torch.device("meta"))
    router = build(config.router, config.machine.allow_modules, site=site)
    return sum(parameter.numel() for parameter in router.parameters())


def attention_parameters(config: Config) -> int:
    """QKV, output projection and, if any, QK-norm of one layer."""
    m = config.model
    projections = m.dim * m.head_dim * (2 * m.num_heads + 2 * m.num_kv_heads)
    norms = {"none": 0, "head": 2 * m.head_dim, "full": (m.num_heads + m.num_kv_heads) * m.head_dim}
    return projections + norms[m.qk_norm]


def size_report(config: Config, vocab_size: int) -> SizeReport:
    """Count a decoder with ``vocab_size`` tokens."""
    m, experts, top_k = config.model, config.experts, traits_of(config).experts_per_token
    num_moe = sum(is_moe_layer(m, i) for i in range(m.num_layers))
    num_dense = m.num_layers - num_moe
    expert = 3 * m.dim * m.expert_dim
    routed = num_moe * experts.num_experts * expert
    embedding = vocab_size * m.dim
    head = 0 if m.tied_embeddings else embedding
    norms = (2 * m.num_layers + 1) * m.dim
    per_moe_layer = router_parameters(config) + experts.num_shared * expert
    dense = m.num_layers * attention_parameters(config) + num_dense * 3 * m.dim * m.ffn_dim + num_moe * per_moe_layer
    total = embedding + head + norms + dense + routed
    active = total - routed + round(num_moe * top_k * expert)
    in_products = active - norms - (0 if m.tied_embeddings else embedding)
    attention = m.num_layers * 2 * m.num_heads * m.head_dim * m.context // 2
    return SizeReport(total, active, embedding, routed, flops_per_token=6 * (in_products + attention))
