"""How rows of numbers look between ranks: as they are, rounded to bf16, or in 8 bits with a scale for each block.

Errors of one way, a the largest magnitude of the block of 128 numbers that x stands in: bf16 at most 2^-8 |x|; fp8
(e4m3) at most 2^-4 |x|, or 2^-10 a / 448 where that is more (of normal numbers). Experts bear fp8 on the way out
(DeepSeek-V3, DeepSeek 2024, sends so); sums on the way home and gradients go as bf16.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Payload = Literal["exact", "bf16", "fp8"]
BLOCK, LARGEST = 128, 448.0
"""Numbers that share a scale, and the largest number of e4m3."""


def encode(x_RD: Tensor, payload: Payload) -> Tensor:
    """[R, D] -> [R, X], what is sent in their place: X = D, or bytes: the fp32 scales of blocks, then D numbers."""
    if payload == "exact":
        return x_RD
    if payload == "bf16":
        return x_RD.to(torch.bfloat16)
    blocks_RBb = torch.nn.functional.pad(x_RD.float(), (0, -x_RD.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    scale_RB = (blocks_RBb.abs().amax(-1) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    codes_RD = (blocks_RBb / scale_RB.unsqueeze(-1)).to(torch.float8_e4m3fn).flatten(1)[:, : x_RD.shape[1]]
    return torch.cat([scale_RB.view(torch.uint8), codes_RD.contiguous().view(torch.uint8)], dim=1)


def decode(sent_RX: Tensor, payload: Payload, dim: int, dtype: torch.dtype) -> Tensor:
    """What ``encode`` made of rows of ``dim`` numbers, in ``dtype``."""
    if payload != "fp8":
        return sent_RX.to(dtype)
    scale_RB = sent_RX[:, :-dim].reshape(-1).view(torch.float32).view(-1, -(-dim // BLOCK))
    codes_RD = sent_RX[:, -dim:].contiguous().view(torch.float8_e4m3fn).float()
    return (codes_RD * scale_RB.repeat_interleave(BLOCK, dim=1)[:, :dim]).to(dtype)


def width(payload: Payload, dim: int, dtype: torch.dtype) -> tuple[int, torch.dtype]:
    """X and the dtype of what is sent for rows of ``dim`` numbers in ``dtype``."""
    if payload == "fp8":
        return dim + 4 * -(-dim // BLOCK), torch.uint8
    return dim, torch.bfloat16 if payload == "bf16" else dtype
