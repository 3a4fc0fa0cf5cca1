"""Grouped-query attention with rotary positions and optional QK-norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moetrain.config import ModelConfig
from moetrain.ops.init import Draw
from moetrain.ops.kernels import Kernels

# q_BHSd: H query heads of width d; k and v have fewer heads, each shared by a group of query heads.


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dim (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device))

    def forward(self, x_XD: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x_XD, self.weight.shape, self.weight, self.eps)


def rotary_tables(head_dim: int, context: int, theta: float, device: torch.device) -> Tensor:
    """cos and sin of every position and frequency, fp32 [2, context, head_dim] (halves repeated)."""
    inverse = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(context, device=device, dtype=torch.float32), inverse)
    angle = torch.cat([angle, angle], dim=-1)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x_BHSd: Tensor, tables_2Sd: Tensor) -> Tensor:
    """Rotary position embedding, rotating halves (Su et al. 2021; the pairing of Llama)."""
    cos_Sd, sin_Sd = tables_2Sd.to(x_BHSd.dtype)
    first, second = x_BHSd.chunk(2, dim=-1)
    return x_BHSd * cos_Sd + torch.cat([-second, first], dim=-1) * sin_Sd


class Attention(nn.Module):
    """Causal self-attention; with a document mask, only inside each document."""

    def __init__(self, model: ModelConfig, device: torch.device, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.num_heads, self.num_kv_heads, self.head_dim = model.num_heads, model.num_kv_heads, model.head_dim
        q_dim, kv_dim = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        self.qkv = nn.Parameter(torch.empty(q_dim + 2 * kv_dim, model.dim, device=device))
        self.out = nn.Parameter(torch.empty(model.dim, q_dim, device=device))
        self.qk_norm = model.qk_norm
        if model.qk_norm != "none":
            full = model.qk_norm == "full"
            self.q_norm = RMSNorm(q_dim if full else model.head_dim, model.norm_eps, device)
            self.k_norm = RMSNorm(kv_dim if full else model.head_dim, model.norm_eps, device)

    def init_weights(self, draw: Draw, std: float, std_out: float) -> None:
        draw.normal_(self.qkv, "qkv", std)
        draw.normal_(self.out, "out", std_out)

    def forward(self, x_BSD: Tensor, tables_2Sd: Tensor, mask_B1SS: Tensor | None) -> Tensor:
        """[B, S, D] -> [B, S, D]. mask_B1SS: bool, True where attention is allowed; None is plain causal."""
        q_dim, kv_dim = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        q, k, v = self.kernels.linear(x_BSD, self.qkv).split([q_dim, kv_dim, kv_dim], dim=-1)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q_BHSd, k_BHSd, v_BHSd = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        if self.qk_norm == "head":
            q_BHSd, k_BHSd = self.q_norm(q_BHSd), self.k_norm(k_BHSd)
        q_BHSd, k_BHSd = rotate(q_BHSd, tables_2Sd), rotate(k_BHSd, tables_2Sd)
        if mask_B1SS is not None:  # kernels that take a mask know no groups; without this the plainest one is taken
            k_BHSd, v_BHSd = (t.repeat_interleave(self.num_heads // self.num_kv_heads, 1) for t in (k_BHSd, v_BHSd))
        y_BHSd = torch.nn.functional.scaled_dot_product_attention(
            q_BHSd,
            k_BHSd,
            v_BHSd,
            attn_mask=mask_B1SS,
            is_causal=mask_B1SS is None,
            enable_gqa=k_BHSd.shape[1] != self.num_heads,
        )
        return self.kernels.linear(y_BHSd.transpose(1, 2).flatten(2), self.out)


def document_mask(document_BS: Tensor) -> Tensor:
    """bool [B, 1, S, S]: causal and inside the same document."""
    same_BSS = document_BS.unsqueeze(2) == document_BS.unsqueeze(1)
    return same_BSS.tril().unsqueeze(1)
