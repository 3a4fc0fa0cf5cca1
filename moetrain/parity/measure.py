"""One block of transformers against one MoE layer: the same weights, the same tokens, outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moetrain.checks import parse
from moetrain.config import Config, Part
from moetrain.moe.layer import MoELayer
from moetrain.moe.replay import Replay
from moetrain.ops.kernels import make_kernels
from moetrain.ops.timeline import Timeline
from moetrain.parallel.mesh import Mesh
from moetrain.parity.block import build_block, gradients_of, tensors_of
from moetrain.parity.case import DIM, NUM_SEQUENCES, SEQUENCE, WIDTH, Case, Measured

VOCAB = 64
RouterPart = Callable[[str], Part]
"""The router section of an option of conf/router, composed by the caller."""


@dataclass(frozen=True)
class Data:
    """x_TD, the ids of those tokens, and the gradient that is sent back from the output."""

    x_TD: Tensor
    tokens_BS: Tensor
    cotangent_TD: Tensor


@dataclass(frozen=True)
class Result:
    """out_TD, the gradients by our names, and that of the input under ``x``."""

    out_TD: Tensor
    gradients: Mapping[str, Tensor]


def measure(cases: Iterable[Case], router_part: RouterPart) -> list[Measured]:
    """Every case, in order. Raises ConfigError if transformers is missing or a case's settings cannot be."""
    return [measure_one(case, router_part) for case in cases]


def measure_one(case: Case, router_part: RouterPart) -> Measured:
    """The block of ``case`` and our layer on the same tokens. CPU, fp32, evaluation mode."""
    config, block = config_of(case, router_part(case.router)), build_block(case)
    theirs = reference(case, block)
    ours = candidate(case, config, block)
    assert theirs.gradients.keys() == ours.gradients.keys(), (theirs.gradients.keys(), ours.gradients.keys())
    errors = [_relative(ours.gradients[name], grad) for name, grad in theirs.gradients.items()]
    return Measured(
        name=case.name,
        block=case.path,
        router=case.router,
        output_error=float((ours.out_TD - theirs.out_TD).abs().max()),
        gradient_error=max(errors),
        output_rms=float(theirs.out_TD.square().mean().sqrt()),
        num_tokens=NUM_SEQUENCES * SEQUENCE,
        num_experts=config.experts.num_experts,
        dim=DIM,
        expert_dim=WIDTH,
    )


def config_of(case: Case, router: Part) -> Config:
    """One dropless MoE layer of a run that will not happen, with what ``case`` asks for."""
    raw: dict[str, Any] = {
        "run": {},
        "model": {
            "dim": DIM,
            "num_layers": 1,
            "num_heads": 1,
            "num_kv_heads": 1,
            "head_dim": DIM,
            "ffn_dim": WIDTH,
            "expert_dim": WIDTH,
            "context": SEQUENCE,
        },
        "experts": {"num_experts": 8} | dict(case.experts),
        "router": dict(router) | dict(case.overrides),
        "capacity": {"factor_train": None, "factor_eval": None} | dict(case.capacity),
        "dispatch": {"_target_": "moetrain.moe.dispatch.local.LocalDispatcher"},
        "balance": {"balance_coef": 0.0, "z_coef": 0.0},
        "engine": {"name": "local", "zero_stage": 0, "dtype": "fp32", "ep_size": 1},
        "optim": {"lr": 1e-3},
        "data": {},
        "train": {"steps": 1, "global_batch": NUM_SEQUENCES, "micro_batch": NUM_SEQUENCES},
        "monitor": {},
        "health": {},
        "machine": {"device": "cpu"},
        "debug": {},
        "control": {},
        "recipe": {},
    }
    return parse(raw, world_size=1)


def reference(case: Case, block: nn.Module) -> Result:
    """What the block of transformers gives; its gradients under our names."""
    given = data()
    x_BSD = given.x_TD.view(NUM_SEQUENCES, SEQUENCE, DIM).requires_grad_()
    out = block(x_BSD.clone(), **({"input_ids": given.tokens_BS} if case.takes_tokens else {}))
    out_TD = (out[0] if isinstance(out, tuple) else out).view(-1, DIM)
    out_TD.backward(given.cotangent_TD)
    gradients = case.layout.parameters(gradients_of(block)) | {"x": _grad(x_BSD).view(-1, DIM)}
    return Result(out_TD.detach(), gradients)


def candidate(case: Case, config: Config, block: nn.Module) -> Result:
    """What our layer gives with the weights of that block, and what the block does to it afterwards."""
    theirs, layer = tensors_of(block), alone(config)
    set_weights(layer, case.layout.parameters(theirs) | case.layout.buffers(theirs))
    given = data()
    x_TD = given.x_TD.requires_grad_()
    out_TD = layer(x_TD, given.tokens_BS, Replay()).hidden_TD
    if case.finish is not None:
        out_TD = case.finish(out_TD, theirs)
    out_TD.backward(given.cotangent_TD)
    gradients = {name: _grad(weight) for name, weight in layer.named_parameters()}
    return Result(out_TD.detach(), gradients | {"x": _grad(x_TD)})


def alone(config: Config) -> MoELayer:
    """The MoE layer of ``config`` in this process, in evaluation mode, weights not yet set."""
    mesh = Mesh(rank=0, world_size=1, ep_size=1, device=torch.device("cpu"))
    timeline, kernels = Timeline(mesh.device, enabled=False), make_kernels(mesh.device, "torch")
    return MoELayer(config, mesh, timeline, kernels, VOCAB, 0).eval()


def set_weights(layer: MoELayer, values: Mapping[str, Tensor]) -> None:
    """Set the layer's parameters, all of them, and those buffers that ``values`` names."""
    parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())
    assert parameters.keys() <= values.keys() <= parameters.keys() | buffers.keys(), (values.keys(), parameters.keys())
    for name, value in values.items():
        target = parameters.get(name, buffers.get(name))
        assert target is not None
        assert target.shape == value.shape, (name, value.shape)
        target.data.copy_(value)


def data() -> Data:
    """The same at every call."""
    draw = torch.Generator().manual_seed(21)
    num_tokens = NUM_SEQUENCES * SEQUENCE
    x_TD, cotangent_TD = (torch.randn(num_tokens, DIM, generator=draw) for _ in range(2))
    tokens_BS = torch.randint(0, VOCAB, (NUM_SEQUENCES, SEQUENCE), generator=draw)
    return Data(x_TD, tokens_BS, cotangent_TD)


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest entry of the reference."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
