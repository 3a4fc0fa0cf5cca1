"""Attention against a plain reference written from the formulas, position by position and head by head."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch

from moetrain.config import ModelConfig
from moetrain.models.attention import Attention, RMSNorm, document_mask, rotary_tables
from moetrain.ops.init import Draw
from moetrain.ops.kernels import make_kernels

CPU = torch.device("cpu")
HEADS, KV_HEADS, WIDTH, DIM, SEQUENCE, THETA = 4, 2, 8, 24, 7, 50.0


def turned(x_d: torch.Tensor, position: int) -> torch.Tensor:
    """Pair (i, i + d/2) turned by position * theta^(-2i/d) (Su et al. 2021), as complex numbers."""
    half = len(x_d) // 2
    angle = position * THETA ** (-2 * torch.arange(half, dtype=torch.float64) / len(x_d))
    pairs = torch.complex(x_d[:half].double(), x_d[half:].double()) * torch.polar(torch.ones(half).double(), angle)
    return torch.cat([pairs.real, pairs.imag])


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / x.square().mean().add(1e-6).sqrt() * weight.double()


def plain(layer: Attention, x_SD: torch.Tensor, document_S: list[int], qk_norm: str) -> torch.Tensor:
    """One sequence, in float64."""
    q_dim, kv_dim = HEADS * WIDTH, KV_HEADS * WIDTH
    queries, keys, values = [], [], []
    for position, x_D in enumerate(x_SD.double()):
        q, k, v = (layer.qkv.double() @ x_D).split([q_dim, kv_dim, kv_dim])
        if qk_norm == "full":
            q, k = normed(q, layer.q_norm.weight), normed(k, layer.k_norm.weight)
        split = [list(t.split(WIDTH)) for t in (q, k, v)]
        if qk_norm == "head":
            split[0] = [normed(head, layer.q_norm.weight) for head in split[0]]
            split[1] = [normed(head, layer.k_norm.weight) for head in split[1]]
        queries.append([turned(head, position) for head in split[0]])
        keys.append([turned(head, position) for head in split[1]])
        values.append(split[2])
    rows = []
    for here in range(len(x_SD)):
        visible = [there for there in range(here + 1) if document_S[there] == document_S[here]]
        heads = []
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            score = torch.stack([queries[here][head] @ keys[there][group] for there in visible]) / math.sqrt(WIDTH)
            heads.append(sum(p * values[there][group] for p, there in zip(score.softmax(0), visible, strict=True)))
        rows.append(layer.out.double() @ torch.cat(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("documents", [[0] * SEQUENCE, [0, 0, 0, 1, 1, 2, 2]])
@pytest.mark.parametrize("qk_norm", ["none", "head", "full"])
def test_attention_equals_the_formulas(qk_norm: Literal["none", "head", "full"], documents: list[int]) -> None:
    model = ModelConfig(
        dim=DIM,
        num_layers=1,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=WIDTH,
        ffn_dim=8,
        expert_dim=8,
        context=SEQUENCE,
        qk_norm=qk_norm,
    )
    layer = Attention(model, CPU, make_kernels(CPU, "torch"))
    layer.init_weights(Draw(3), 0.3, 0.3)
    for norm in (m for m in layer.modules() if isinstance(m, RMSNorm)):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x_BSD = torch.randn(1, SEQUENCE, DIM)
    mask = document_mask(torch.tensor([documents])) if documents[-1] else None
    ours = layer(x_BSD, rotary_tables(WIDTH, SEQUENCE, THETA, CPU), mask)[0]
    torch.testing.assert_close(ours.double(), plain(layer, x_BSD[0], documents, qk_norm), rtol=1e-4, atol=1e-5)


def test_rms_norm_is_its_formula() -> None:
    norm = RMSNorm(6, 1e-6, CPU)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x_D = torch.randn(6)
    torch.testing.assert_close(norm(x_D).double(), normed(x_D.double(), norm.weight), rtol=1e-5, atol=1e-6)
