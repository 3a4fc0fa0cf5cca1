"""A sample from the model, to be read by a human."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def generate(
    logits: Callable[[Tensor], Tensor], context: int, prompt_S: Tensor, num_tokens: int, temperature: float, seed: int
) -> Tensor:
    """int64 [S] -> [S + num_tokens], sampled at ``temperature`` (0 is greedy), the window sliding over the context.

    logits: int64 [B, S] -> fp32 [B, S, V], in eval mode. Every rank of an EP group calls it with the same prompt, since
    their experts are needed.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    tokens_S = prompt_S
    for _ in range(num_tokens):
        logits_V = logits(tokens_S[-context:].unsqueeze(0))[0, -1].cpu()
        if temperature == 0:
            chosen = logits_V.argmax().view(1)
        else:
            chosen = torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator)
        tokens_S = torch.cat([tokens_S, chosen.to(tokens_S.device)])
    return tokens_S
