"""DeepSpeed's two layers: ``MoE``, with a capacity and dropless, and the one that AutoEP puts into a model.

The only file of the benchmarks that imports it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetrain.bench.peers.case import LayerCase
from moetrain.bench.race import Contestant


def contestants(case: LayerCase) -> list[Contestant]:
    _init_distributed(case)
    return [_moe(case, drop=True), _moe(case, drop=False), _auto_ep(case)]


def _init_distributed(case: LayerCase) -> None:
    if not dist.is_initialized():
        backend = dist.get_default_backend_for_device(case.mesh.device)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    os.environ.setdefault("LOCAL_RANK", "0")
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed

        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)


class _Expert(nn.Module):
    """A SwiGLU, as DeepSpeed wants an expert: one module each."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, width, bias=False)
        self.down = nn.Linear(width // 2, dim, bias=False)

    def forward(self, x_RD: Tensor) -> Tensor:
        gate_RF, up_RF = self.gate_up(x_RD).chunk(2, dim=-1)
        out_RD: Tensor = self.down(torch.nn.functional.silu(gate_RF) * up_RF)
        return out_RD


def _moe(case: LayerCase, drop: bool) -> Contestant:
    from deepspeed.moe.layer import MoE

    num_local, width, dim = case.gate_up_eFD.shape
    with contextlib.redirect_stdout(io.StringIO()):
        layer = MoE(
            hidden_size=dim,
            expert=_Expert(dim, width),
            num_experts=case.num_experts,
            ep_size=case.mesh.ep_size,
            k=case.top_k,
            capacity_factor=1.25,
            drop_tokens=drop,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        layer.set_deepspeed_parallelism()
    layer = layer.to(case.x_TD.device, case.x_TD.dtype)
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.copy_(case.gate_ED)
        for number, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
            expert.gate_up.weight.copy_(case.gate_up_eFD[number])
            expert.down.weight.copy_(case.down_eDF[number])
        assert number + 1 == num_local, (number, num_local)

    def run(x_TD: Tensor) -> tuple[Tensor, Tensor]:
        out_TD, aux, _ = layer(x_TD)
        return out_TD, aux

    name = "DeepSpeed, capacity 1.25" if drop else "DeepSpeed, dropless"
    return case.contestant(name, layer, run, "drops tokens" if drop else "")


def _auto_ep(case: LayerCase) -> Contestant:
    """The layer alone, as AutoEP makes it of Mixtral's: the engine, which swaps it in, needs transformers <= 5.22; the
    layer needs none. It has no balance loss: Switch's is taken of its router.
    """
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    width, num_experts = case.down_eDF.shape[2], case.num_experts
    # with Triton installed it would run Triton's SwiGLU, on a CPU too, where Triton can't
    grouped = case.x_TD.device.type != "cpu" or importlib.util.find_spec("triton") is None
    config = AutoEPConfig(load_balance_coeff=None, use_grouped_mm=grouped)
    with contextlib.redirect_stdout(io.StringIO()):
        layer = AutoEPMoELayer(_mixtral(case), _source(case), case.mesh.ep_size, case.mesh.ep_rank, config)
        layer.set_deepspeed_parallelism()
    layer = layer.to(case.x_TD.device)
    with torch.no_grad():
        layer.experts.w1.copy_(case.gate_up_eFD[:, :width])
        layer.experts.w3.copy_(case.gate_up_eFD[:, width:])
        layer.experts.w2.copy_(case.down_eDF)
    seen: dict[str, Any] = {}
    layer.router.gate.register_forward_hook(lambda _module, _inputs, output: seen.update(logits_TE=output))
    layer.router.register_forward_hook(lambda _module, _inputs, output: seen.update(counts_E=output[2]))

    def run(x_TD: Tensor) -> tuple[Tensor, Tensor]:
        out_TD = layer(x_TD.unsqueeze(0))[0]
        share_E = seen["counts_E"] / (x_TD.shape[0] * case.top_k)
        return out_TD, num_experts * (share_E * seen["logits_TE"].float().softmax(-1).mean(0)).sum()

    return case.contestant("DeepSpeed AutoEP", layer, run)


def _mixtral(case: LayerCase) -> Any:
    """What AutoEP finds out about a layer of Mixtral."""
    from deepspeed.module_inject.auto_ep_config import PRESET_MODELS, MoELayerSpec

    preset = PRESET_MODELS["mixtral"]
    return MoELayerSpec(
        moe_module_name="mlp",
        model_family="mixtral",
        router_name=preset.router_pattern,
        experts_name=preset.experts_pattern,
        expert_storage=preset.expert_storage,
        expert_w1_name=preset.expert_w1,
        expert_w2_name=preset.expert_w2,
        expert_w3_name=preset.expert_w3,
        num_experts=case.num_experts,
        top_k=case.top_k,
        hidden_size=case.down_eDF.shape[1],
        ffn_hidden_size=case.down_eDF.shape[2],
        score_func=preset.score_func,
        score_apply=preset.score_apply,
        route_norm=preset.route_norm,
        gate_bias=preset.gate_bias,
        return_router_logits=False,
        router_logits_capture_target="none",
        router_logits_capture_index=None,
        router_logits_capture_layer_name=None,
        has_shared_experts=False,
        shared_experts_name="",
    )


def _source(case: LayerCase) -> Any:
    """A layer of Mixtral as far as AutoEP looks at it: this rank's experts are given their weights later."""
    _, width, dim = case.gate_up_eFD.shape
    gate = nn.Linear(dim, case.num_experts, bias=False).to(case.x_TD.device, case.x_TD.dtype)
    with torch.no_grad():
        gate.weight.copy_(case.gate_ED)
    nothing = case.x_TD.new_zeros(())
    up, down = (nn.Parameter(nothing.expand(case.num_experts, *shape)) for shape in ((width, dim), (dim, width // 2)))
    return SimpleNamespace(gate=gate, experts=SimpleNamespace(gate_up_proj=up, down_proj=down))
