"""A block of transformers, built alone and filled with random numbers. The only file here that imports transformers."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from moetrain.parity.case import Case
from moetrain.types import ConfigError, Problem

TRANSFORMERS = "5.23.0"


def build_block(case: Case) -> nn.Module:
    """The reference block of ``case`` in evaluation mode, experts computed one by one. Raises ConfigError."""
    folder = f"transformers.models.{case.model}"
    config = getattr(_module(f"{folder}.configuration_{case.model}"), case.config)(**case.arguments)
    config._experts_implementation = "eager"
    found = getattr(_module(f"{folder}.modeling_{case.model}"), case.block)
    block: nn.Module = found(config, **case.block_arguments).float().eval()
    fill(block, case.std)
    if case.layout.bias is not None and case.layout.unbiased:
        tensors_of(block)[case.layout.bias][-case.layout.unbiased :] = 0.0
    return block


def fill(block: nn.Module, std: float) -> None:
    """Every parameter and buffer from N(0, std^2), the same at every call; a table of expert ids: distinct in a row."""
    draw = torch.Generator().manual_seed(20)
    for name, tensor in sorted(tensors_of(block).items()):
        if tensor.is_floating_point():
            tensor.normal_(0.0, std, generator=draw)
        else:
            assert name.endswith("tid2eid"), name
            num_experts = block.gate.num_experts
            tensor.copy_(torch.rand(tensor.shape[0], num_experts, generator=draw).argsort(1)[:, : tensor.shape[1]])


def tensors_of(block: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, without their graph."""
    return {name: tensor.detach() for name, tensor in (*block.named_parameters(), *block.named_buffers())}


def gradients_of(block: nn.Module) -> dict[str, Tensor]:
    """Gradients of the parameters by name; zeros where nothing came."""
    given = {name: weight.grad for name, weight in block.named_parameters()}
    zeros = {name: torch.zeros_like(weight) for name, weight in block.named_parameters()}
    return {name: zeros[name] if grad is None else grad for name, grad in given.items()}


def transformers_version() -> str:
    """The version installed. Raises ConfigError if there is none."""
    version: str = _module("transformers").__version__
    return version


def _module(path: str) -> Any:
    try:
        return importlib.import_module(path)
    except ImportError as error:
        reason = "the reference blocks need the package transformers"
        fix = f"install it: pip install transformers=={TRANSFORMERS}"
        raise ConfigError([Problem("routers", "measure", reason, fix)]) from error
