"""Mixtral's layer of Hugging Face transformers, with two of its implementations of the experts; on one process."""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.bench.peers.case import LayerCase
from moetrain.bench.race import Contestant


def contestants(case: LayerCase) -> list[Contestant]:
    return [_layer(case, kind) for kind in ("grouped_mm", "eager")] if case.mesh.world_size == 1 else []


def _layer(case: LayerCase, kind: str) -> Contestant:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

    _, width, dim = case.gate_up_eFD.shape
    config = MixtralConfig(
        hidden_size=dim,
        intermediate_size=width // 2,
        num_local_experts=case.num_experts,
        num_experts_per_tok=case.top_k,
    )
    config._experts_implementation = kind
    block = MixtralSparseMoeBlock(config).to(case.x_TD.device, case.x_TD.dtype)
    with torch.no_grad():
        block.gate.weight.copy_(case.gate_ED)
        block.experts.gate_up_proj.copy_(case.gate_up_eFD)
        block.experts.down_proj.copy_(case.down_eDF)
    logits: list[Tensor] = []
    block.gate.register_forward_hook(lambda _module, _inputs, output: logits.append(output[0]))

    def run(x_TD: Tensor) -> tuple[Tensor, Tensor]:
        logits.clear()
        out_TD = block(x_TD.unsqueeze(0))[0]
        return out_TD, load_balancing_loss_func((logits[0],), case.num_experts, case.top_k)

    return case.contestant(f"transformers {kind}", block, run)
