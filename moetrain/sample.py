"""What the model writes when the run is done."""

from __future__ import annotations

import torch

from moetrain.config import Config
from moetrain.data import Corpus
from moetrain.engine import Engine
from moetrain.models.generate import generate

TEMPERATURE = 0.8


def sample_text(config: Config, engine: Engine, corpus: Corpus, device: torch.device) -> str | None:
    """One document's beginning, of at most ``train.sample_tokens`` tokens; None if that is 0. Collective."""
    num_tokens = config.train.sample_tokens
    if num_tokens == 0:
        return None
    end_of_document = corpus.tokenizer.end_of_document
    prompt = torch.tensor([end_of_document], device=device)
    drawn = generate(engine.logits, config.model.context, prompt, num_tokens, TEMPERATURE, config.run.seed)
    tokens = drawn[1:].tolist()
    end = tokens.index(end_of_document) if end_of_document in tokens else num_tokens
    return corpus.tokenizer.decode(tokens[:end]).strip()
