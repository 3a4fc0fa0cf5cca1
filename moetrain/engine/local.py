"""Plain torch: one process, or any number of ranks with all-reduce. Small enough to be believed: the others' oracle."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetrain.canonical import State
from moetrain.config import Config
from moetrain.engine.base import (
    ExpertWatch,
    detached,
    make_optimizer,
    param_options,
    parameter_groups,
    set_lr,
)
from moetrain.engine.flat import FlatParameters
from moetrain.engine.state import CanonicalState
from moetrain.parallel.mesh import Mesh, weight_dtype
from moetrain.types import Batch, ModelOutput


class LocalEngine:
    """See ``Engine``. Every rank holds all of the dense weights, the optimiser's state and its own experts."""

    def __init__(self, config: Config, model: nn.Module, mesh: Mesh, accumulation: int) -> None:
        self.model = model.train()
        self._mesh, self._accumulation, self._clip_norm = mesh, accumulation, config.optim.clip_norm
        self._watch = ExpertWatch(model)
        self._canonical = CanonicalState(model, mesh, config.optim)
        groups = parameter_groups(model, mesh.ep_size)
        self._flat = FlatParameters(groups, weight_dtype(config.engine, mesh.device))
        masters = self._flat.masters
        options = [param_options(group, [masters[group.name]], config.optim) for group in groups]
        self._optimizer = make_optimizer(config.optim, options)
        self._num_done = 0

    def forward_backward(self, batch: Batch) -> ModelOutput:
        output = self.model(batch.to(self._mesh.device))
        (output.loss / self._accumulation).backward()
        self._watch.check()
        self._num_done += 1
        return detached(output)

    def step(self, lr: float, accepts: Callable[[float], bool] = math.isfinite) -> float:
        assert self._num_done == self._accumulation, (self._num_done, self._accumulation)
        self._num_done = 0
        self._reduce()
        norm = self._flat.clip(self._clip_norm, self._mesh.ep_group)
        if accepts(norm):
            set_lr(self._optimizer, lr)
            self._optimizer.step()
            self._flat.refresh()
        self._flat.zero_grad()
        return norm

    def _reduce(self) -> None:
        """Sum over replicas, divide by the whole world, experts too: their tokens already came from all EP ranks."""
        if self._mesh.world_group is None:
            return
        for grad, group in (
            (self._flat.dense_grad, self._mesh.world_group),
            (self._flat.expert_grad, self._mesh.expert_dp_group),
        ):
            if grad.numel():
                dist.all_reduce(grad, group=group)
                grad.div_(self._mesh.world_size)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> ModelOutput:
        self.model.eval()
        output = self.model(batch.to(self._mesh.device))
        self.model.train()
        return detached(output)

    @torch.no_grad()
    def logits(self, tokens_BS: Tensor) -> Tensor:
        self.model.eval()
        logits_BSV: Tensor = self.model.logits(tokens_BS)
        self.model.train()
        return logits_BSV

    def state(self) -> State:
        return self._flat.state(self._canonical, self._optimizer, self._mesh)

    @torch.no_grad()
    def load_state(self, fill: Callable[[State], None]) -> None:
        fill(self.state())
        self._flat.refresh()
