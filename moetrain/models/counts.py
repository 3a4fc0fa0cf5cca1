"""Parameters, active parameters and FLOPs, from the configuration alone; a test holds them against the built module."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moetrain.checks import traits_of
from moetrain.config import Config, ModelConfig
from moetrain.models.block import is_moe_layer
from moetrain.models.mixture_of_depths import is_depth_block, num_through
from moetrain.moe.experts import activation_of
from moetrain.parts import build
from moetrain.types import RouterSite


@dataclass(frozen=True)
class SizeReport:
    """Parameters of the whole model (all experts), and what one token uses.

    active: total without the routed experts that a token does not visit; where tokens may pass by a block, the mean
    over tokens in training at full context. flops_per_token: likewise, forward and backward of one token, multiply and
    add counted apart, causal attention counted as half of the square.
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


def expert_parameters(config: Config) -> int:
    """One routed expert: its weights, and its biases if it has any."""
    width = activation_of(config.experts).num_inputs * config.model.expert_dim
    weights = (width + config.model.expert_dim) * config.model.dim
    return weights + (width + config.model.dim if config.experts.bias else 0)


def shared_parameters(config: Config) -> int:
    """The shared experts of one MoE layer, and the gate that weighs them."""
    if not config.experts.num_shared:
        return 0
    matrices = activation_of(config.experts).num_inputs + 1
    gate = config.model.dim if config.experts.shared_mode == "gated" else 0
    return matrices * config.model.dim * config.model.expert_dim * config.experts.num_shared + gate


def share_through(model: ModelConfig, index: int) -> float:
    """The share of tokens that go through block ``index`` in training, at full context."""
    return num_through(model, model.context) / model.context if is_depth_block(model, index) else 1.0


def size_report(config: Config, vocab_size: int) -> SizeReport:
    """Count a decoder with ``vocab_size`` tokens."""
    m, experts, top_k = config.model, config.experts, traits_of(config).experts_per_token
    moe = [is_moe_layer(m, i) for i in range(m.num_layers)]
    shares = [share_through(m, i) for i in range(m.num_layers)]
    expert, matrices = expert_parameters(config), activation_of(config.experts).num_inputs + 1
    routed = sum(moe) * experts.num_experts * expert
    embedding = vocab_size * m.dim
    head = 0 if m.tied_embeddings else embedding
    depth = sum(is_depth_block(m, i) for i in range(m.num_layers)) * (2 * m.dim + 1)
    per_moe, per_dense = router_parameters(config) + shared_parameters(config), matrices * m.dim * m.ffn_dim
    dense = [attention_parameters(config) + (per_moe if is_moe else per_dense) for is_moe in moe]
    visited = [dense[i] + moe[i] * top_k * expert for i in range(m.num_layers)]
    products = embedding + depth + sum(share * own for share, own in zip(shares, visited, strict=True))
    outside = head + m.dim + sum(share * 2 * m.dim for share in shares)
    attention = sum(share**2 for share in shares) * 2 * m.num_heads * m.head_dim * m.context // 2
    return SizeReport(
        total=embedding + head + (2 * m.num_layers + 1) * m.dim + depth + sum(dense) + routed,
        active=round(products + outside),
        embedding=embedding,
        routed=routed,
        flops_per_token=round(6 * (products + attention)),
    )
