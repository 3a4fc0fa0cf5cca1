"""Weights and gradients of a model in few flat tensors: one collective per group, one optimiser kernel per group."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from moetrain.canonical import State, Stretch
from moetrain.engine.base import ParameterGroup
from moetrain.engine.state import CanonicalState
from moetrain.parallel.collectives import sum_over
from moetrain.parallel.mesh import Mesh


class FlatParameters:
    """Takes over the storage of all parameters of ``groups``.

    ``masters``: name of group -> flat fp32 weights, with a gradient: what the optimiser updates. In bf16 the model's
    parameters are views of a rounded copy (masters start from the rounded weights, as DeepSpeed's do); in fp32 they are
    views of the masters themselves. ``dense_grad`` and ``expert_grad`` are fp32 in both cases, so that micro-batches
    add up in fp32: a bf16 sum stops growing after some hundred equal terms.
    """

    def __init__(self, groups: list[ParameterGroup], dtype: torch.dtype) -> None:
        self._groups = groups
        self._weights: dict[str, Tensor] = {}
        self.masters: dict[str, Tensor] = {}
        for group in groups:
            weights = torch.cat([p.detach().reshape(-1).to(dtype) for p in group.params.values()])
            self._weights[group.name] = weights
            self.masters[group.name] = nn.Parameter(weights.float())
            for param, view in zip(group.params.values(), _views(weights, group), strict=True):
                param.data = view
                param.grad_dtype = torch.float32
        self.dense_grad = self._zeros([g for g in groups if not g.is_expert])
        self.expert_grad = self._zeros([g for g in groups if g.is_expert])
        self.attach()

    def _zeros(self, groups: list[ParameterGroup]) -> Tensor:
        device = next(iter(self.masters.values())).device
        return torch.zeros(sum(self.masters[g.name].numel() for g in groups), device=device)

    def attach(self) -> None:
        """Point every ``grad`` at its piece of the flat buffers (again, where something has set it to None)."""
        used = {False: 0, True: 0}
        for group in self._groups:
            master, start = self.masters[group.name], used[group.is_expert]
            grad = (self.expert_grad if group.is_expert else self.dense_grad)[start : start + master.numel()]
            used[group.is_expert] += master.numel()
            master.grad = grad
            for param, view in zip(group.params.values(), _views(grad, group), strict=True):
                param.grad = view

    def zero_grad(self) -> None:
        self.dense_grad.zero_()
        self.expert_grad.zero_()

    def clip(self, max_norm: float | None, ep_group: ProcessGroup | None) -> float:
        """Scale all (already averaged) gradients so that their true global norm is at most ``max_norm``; returns it.

        Dense gradients are the same on every rank, experts differ over the EP group only: each counts exactly once.
        A norm that is not finite scales nothing.
        """
        expert = sum_over(self._squares(is_expert=True), ep_group)
        norm = math.sqrt(float(self._squares(is_expert=False) + expert))
        if max_norm is not None and math.isfinite(norm) and norm > max_norm:
            scale = max_norm / (norm + 1e-6)
            self.dense_grad.mul_(scale)
            self.expert_grad.mul_(scale)
        return norm

    def _squares(self, *, is_expert: bool) -> Tensor:
        grads = [p.grad for g in self._groups if g.is_expert is is_expert for p in g.params.values()]
        assert all(grad is not None for grad in grads)
        norm = get_total_norm([g for g in grads if g is not None]) if grads else self.dense_grad.new_zeros(())
        return norm.double().square()

    def state(self, canonical: CanonicalState, optimizer: Optimizer, mesh: Mesh) -> State:
        """Every rank holds all of its masters; of those that others hold too, each writes its share."""
        held, shares = [], []
        for group in self._groups:
            master, at = self.masters[group.name], 0
            rank, world_size = mesh.rank, mesh.world_size
            if group.is_expert:
                rank, world_size = rank // mesh.ep_size, world_size // mesh.ep_size
            begin, end = (master.numel() * r // world_size for r in (rank, rank + 1))
            for name, param in group.params.items():
                whole = Stretch(name, 0, param.numel(), master, at)
                held.append(whole)
                shares.append(whole.within(begin, end))
                at += param.numel()
        return canonical.of(held, shares, optimizer)

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the masters into the model's weights; nothing to do in fp32, where they are the same memory."""
        for name, weights in self._weights.items():
            if weights.dtype != torch.float32:
                weights.copy_(self.masters[name])


def _views(flat: Tensor, group: ParameterGroup) -> list[Tensor]:
    """Pieces of ``flat`` in the shapes of the group's parameters."""
    pieces = flat.split([p.numel() for p in group.params.values()])
    return [piece.view(p.shape) for piece, p in zip(pieces, group.params.values(), strict=True)]
