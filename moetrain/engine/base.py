"""What an engine is, and what all engines decide alike: dtype, parameter groups, optimiser, clipping."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moetrain.canonical import State
from moetrain.config import OptimConfig
from moetrain.types import Batch, ModelOutput

MAX_BUCKET = 100_000_000
"""Values that DeepSpeed reduces at once."""


class Engine(Protocol):
    """Trains ``model``, which stays the unwrapped module.

    One optimiser step is ``accumulation`` calls of ``forward_backward`` and one of ``step``, on every rank alike.
    """

    model: nn.Module

    def forward_backward(self, batch: Batch) -> ModelOutput:
        """One micro-batch of this rank: gradients of ``loss / accumulation`` are added up; the output has no graph."""

    def step(self, lr: float, accepts: Callable[[float], bool] = math.isfinite) -> float:
        """Average gradients over the world, clip by the global norm, update with ``lr``, zero the gradients.

        Returns the norm before clipping, ``sqrt(|dense|^2 + sum over distinct experts |g|^2)``, the same on every rank.
        ``accepts`` is asked once, with that norm, before anything moves: where it says no (as it must of what is not
        finite), the weights and the optimiser's state are left as they were.
        """

    def evaluate(self, batch: Batch) -> ModelOutput:
        """Forward in eval mode, without gradients."""

    def logits(self, tokens_BS: Tensor) -> Tensor:
        """fp32 [B, S, V] in eval mode, without gradients. (Under ZeRO 3 the bare model has no weights for it.)"""

    def state(self) -> State:
        """fp32 weights, optimiser state and persistent buffers under canonical names: views of what is trained."""

    def load_state(self, fill: Callable[[State], None]) -> None:
        """Have ``fill`` write into everything that the state holds; then bring the model's weights in line.

        What any engine gave at any layout can be put back, to the bit. Collective.
        """


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with one fate, by name: experts are reduced over their replicas only, vectors (norms) do not decay."""

    name: str
    params: dict[str, nn.Parameter]
    is_expert: bool
    decays: bool


def parameter_groups(model: nn.Module, ep_size: int) -> list[ParameterGroup]:
    """Every trainable parameter once. At ``ep_size`` 1 each rank holds all experts: they are reduced like the rest.

    An expert's parameter has one dim more than it would have alone, so a stacked bias is a vector too.
    """
    stacked = model.expert_names()
    groups = [
        ParameterGroup(f"{'expert' if is_expert else 'dense'}.{'decay' if decays else 'plain'}", {}, is_expert, decays)
        for is_expert in (False, True)
        for decays in (True, False)
    ]
    for name, param in model.named_parameters():
        if param.requires_grad:
            decays = param.dim() - (name in stacked) > 1
            groups[2 * (ep_size > 1 and name in stacked) + (not decays)].params[name] = param
    return [group for group in groups if group.params]


def param_options(group: ParameterGroup, params: list[Tensor], optim: OptimConfig) -> dict[str, Any]:
    """The group as a torch optimiser takes it; ``params`` stand in for the group's own (flat copies of them, say)."""
    return {"params": params, "weight_decay": optim.weight_decay if group.decays else 0.0}


def make_optimizer(optim: OptimConfig, groups: list[dict[str, Any]]) -> Optimizer:
    """The torch optimiser of ``optim`` in its fused form, one kernel for a whole flat tensor; no momentum for SGD."""
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, fused=True)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def set_lr(optimizer: Any, lr: float) -> None:
    """One learning rate for all groups of an optimiser, or of something that wraps one."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def detached(output: ModelOutput) -> ModelOutput:
    """The same numbers without their graph."""
    return ModelOutput(output.loss.detach(), output.lm.detach(), output.losses.detach())


class ExpertWatch:
    """Sees to it that every stacked expert parameter takes part in every backward, with tokens or without.

    An expert that is left out on one rank while its replica on another takes part makes ZeRO 1 and 2 average the wrong
    tensors without a word.
    """

    def __init__(self, model: nn.Module) -> None:
        names = model.expert_names()
        self._names = frozenset(names)
        self._seen: set[str] = set()
        for name, param in model.named_parameters():
            if name in names:
                param.register_post_accumulate_grad_hook(partial(self._mark, name))

    def _mark(self, name: str, _: Tensor) -> None:
        self._seen.add(name)

    def check(self) -> None:
        """After a backward: nothing may be missing."""
        missing, self._seen = self._names - self._seen, set()
        assert not missing, f"experts without a gradient in this backward: {sorted(missing)}"
