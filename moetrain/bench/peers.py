"""MoE layers of other libraries, with given weights, as contestants. What is not installed is named, not skipped over.

The only file of the benchmarks, beside ``hf.py``, that imports them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetrain.bench.race import Contestant
from moetrain.parallel.mesh import Mesh

AUX_COEF = 0.01


@dataclass(frozen=True)
class LayerCase:
    """One MoE layer, the same for everybody. x_TD and weights are in ``dtype``: gate_ED, and of the experts of this
    rank gate_up_eFD [e, 2F, D] and down_eDF [e, D, F]. grad_TD: of the output.
    """

    x_TD: Tensor
    grad_TD: Tensor
    gate_ED: Tensor
    gate_up_eFD: Tensor
    down_eDF: Tensor
    top_k: int
    mesh: Mesh

    @property
    def num_experts(self) -> int:
        return self.gate_ED.shape[0]

    def contestant(
        self, name: str, module: nn.Module, run: Callable[[Tensor], tuple[Tensor, Tensor]], note: str = ""
    ) -> Contestant:
        """run: x_TD -> (output, balance loss as the library has it)."""
        x_TD = self.x_TD.clone().requires_grad_()

        def step() -> Tensor:
            out_TD, aux = run(x_TD)
            torch.autograd.backward([out_TD, AUX_COEF * aux], [self.grad_TD, torch.ones_like(aux)])
            return out_TD.detach()

        def clear() -> None:
            x_TD.grad = None
            module.zero_grad(set_to_none=True)

        return Contestant(name, step, clear, note)


def peers(case: LayerCase) -> tuple[list[Contestant], list[str]]:
    """Those that can be had on this world, and why the others can not."""
    found: list[Contestant] = []
    missing: list[str] = []
    if case.mesh.world_size == 1:
        if importlib.util.find_spec("transformers") is None:
            missing.append("transformers is not installed (pip install 'moetrain[bench]')")
        else:
            found += [_hugging_face(case, "grouped_mm"), _hugging_face(case, "eager")]
    found += [_deepspeed(case, drop=True), _deepspeed(case, drop=False)]
    missing += [f"{name} is not installed" for name in ("tutel",) if importlib.util.find_spec(name) is None]
    return found, missing


def _hugging_face(case: LayerCase, kind: str) -> Contestant:
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


def _deepspeed(case: LayerCase, drop: bool) -> Contestant:
    if not dist.is_initialized():
        backend = dist.get_default_backend_for_device(case.mesh.device)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    os.environ.setdefault("LOCAL_RANK", "0")
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed
        from deepspeed.moe.layer import MoE

        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        num_local, width, dim = case.gate_up_eFD.shape
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
