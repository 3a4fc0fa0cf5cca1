"""The peer: Mixtral as Hugging Face transformers has it, data parallel by torch. The only file of the benchmark that
imports transformers.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moetrain.checks import traits_of
from moetrain.config import Config
from moetrain.parallel.mesh import weight_dtype
from moetrain.types import Batch, ConfigError, Problem


class HuggingFaceStep:
    """The same decoder, every expert on every rank, grouped_mm; AdamW, clipping and balance loss as in ``config``."""

    def __init__(self, config: Config, vocab_size: int, device: torch.device) -> None:
        self._config, self._device = config, device
        self.model = _mixtral(config, vocab_size).to(device, weight_dtype(config.engine, device))
        self._wrapped = DistributedDataParallel(self.model) if dist.is_initialized() else self.model
        optim = config.optim
        betas = (optim.beta1, optim.beta2)
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=optim.lr, betas=betas, weight_decay=optim.weight_decay, fused=True
        )

    def step(self, batches: list[Batch]) -> float:
        """One optimiser step on these micro-batches; returns the loss of the last."""
        loss = torch.zeros(())
        for number, batch in enumerate(batches):
            tokens_BS = batch.to(self._device).tokens_BS
            with self._reduced_later(number + 1 < len(batches)):
                loss = self._wrapped(input_ids=tokens_BS, labels=tokens_BS, output_router_logits=True).loss
                (loss / len(batches)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self._config.optim.clip_norm or float("inf"))
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach())

    def _reduced_later(self, later: bool) -> AbstractContextManager[None]:
        ddp = self._wrapped
        return ddp.no_sync() if later and isinstance(ddp, DistributedDataParallel) else nullcontext()


def _mixtral(config: Config, vocab_size: int) -> nn.Module:
    try:
        from transformers import MixtralConfig, MixtralForCausalLM
    except ImportError as error:
        fix = "install it: pip install 'moetrain[bench]'"
        raise ConfigError([Problem("bench", "step", "the peer needs the package transformers", fix)]) from error
    model = config.model
    plain = MixtralConfig(
        vocab_size=vocab_size,
        hidden_size=model.dim,
        intermediate_size=model.expert_dim,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        num_local_experts=config.experts.num_experts,
        num_experts_per_tok=int(traits_of(config).experts_per_token),
        max_position_embeddings=model.context,
        tie_word_embeddings=model.tied_embeddings,
        router_aux_loss_coef=config.balance.balance_coef,
        sliding_window=None,
        use_cache=False,
        attn_implementation="sdpa",
    )
    built = MixtralForCausalLM(plain)
    built.set_experts_implementation("grouped_mm")
    return built
