"""A sample from the model, to be read by a human."""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.models.decoder import Decoder


@torch.no_grad()
def generate(model: Decoder, prompt_S: Tensor, num_tokens: int, temperature: float, seed: int) -> Tensor:
    """int64 [S] -> [S + num_tokens], sampled at ``temperature`` (0 is greedy), the window sliding over the context.

    Every rank of an EP group calls it with the same prompt, since their experts are needed; all get the same tokens.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator(device="cpu").manual_seed(seed)
    tokens_S = prompt_S
    for _ in range(num_tokens):
        logits_V = model.logits(tokens_S[-model.context :].unsqueeze(0))[0, -1].cpu()
        if temperature == 0:
            chosen = logits_V.argmax().view(1)
        else:
            chosen = torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator)
        tokens_S = torch.cat([tokens_S, chosen.to(tokens_S.device)])
    model.train(was_training)
    return tokens_S
