"""Noise on a router's input or logits: in training only, on the router's own copies, nothing in evaluation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from moetrain.types import Problem, RouterSite

NoiseKind = Literal["none", "jitter", "gaussian", "learned", "gumbel", "warmup"]
SCALED = ("jitter", "gaussian", "gumbel")
SCALE = 0.01
"""What ``noise_scale`` may be although it plays no part: the default of the router that has it."""
STD_MIN = 1e-6
"""Learned noise is at least this wide: its losses divide by its size."""
MEMORY = 0.9
"""How much of the running mean and deviation of the logits outlasts one step of the warm-up."""


def gumbel_like(logits_TE: Tensor) -> Tensor:
    """Draws of Gumbel(0, 1), -log(E) of an exponential E. E = 0 can be drawn, and without a bound -log(0) would win
    whatever the logits.
    """
    return -torch.empty_like(logits_TE).exponential_().clamp_min(torch.finfo(logits_TE.dtype).tiny).log()


class Noise(nn.Module):
    """Kinds of noise, ``num_logits`` (E, and zero experts if any) logits wide:

    jitter: x * U(1 - scale, 1 + scale) (Switch). gaussian: logits + scale * N(0, 1). learned: logits +
    learned_std(x) * N(0, 1), W from zeros, ``scale`` has no part in it (Shazeer et al. 2017). gumbel: logits + scale *
    Gumbel(0, 1), so that under scale 1 the first choice is a draw from the softmax. warmup (Ling, arXiv 2503.05139):
    in step i of ``steps``, a * logits + (1 - a) * (mean + std * N(0, 1)) with a = i / steps, from i = 1; mean and std,
    of all logits of the layer, run along in buffers. ``adjust``, once a step, alone moves them.
    """

    def __init__(self, kind: NoiseKind, scale: float, steps: int, site: RouterSite, num_logits: int) -> None:
        super().__init__()
        self.kind, self.scale, self.steps = kind, scale, steps
        if kind == "learned":
            self.gate = nn.Parameter(torch.zeros(num_logits, site.dim, device=site.device))
        if kind == "warmup":
            for name, value in (("mean", 0.0), ("std", 1.0), ("num_steps", 0.0)):
                self.register_buffer(name, torch.full((), value, dtype=torch.float32, device=site.device))

    @staticmethod
    def problems(kind: NoiseKind, scale: float, steps: int) -> list[Problem]:
        """Settings that draw nothing, or turn the input around."""
        problems = []
        if kind not in SCALED and scale != SCALE:
            fix = f"set router.noise_scale={SCALE:g}, its default, or router.noise={' | '.join(SCALED)}"
            problems.append(Problem("router.noise_scale", scale, f"has no part in router.noise={kind}", fix))
        elif scale < 0 or (kind == "jitter" and scale > 1):
            reason = "must be 0 or more" + (", and at most 1" if kind == "jitter" else "")
            problems.append(Problem("router.noise_scale", scale, reason, f"set router.noise_scale={SCALE:g}, say"))
        if kind == "warmup" and steps < 1:
            reason = "a warm-up of the router lasts a number of optimiser steps"
            problems.append(Problem("router.noise_steps", steps, reason, "set router.noise_steps=100, say"))
        if kind != "warmup" and steps != 0:
            fix = "set router.noise_steps=0, or router.noise=warmup"
            problems.append(Problem("router.noise_steps", steps, f"has no part in router.noise={kind}", fix))
        return problems

    def input(self, x_TD: Tensor) -> Tensor:
        """What the router reads instead of ``x_TD``, fp32, which is left alone."""
        if not self.training or self.kind != "jitter":
            return x_TD
        return x_TD * torch.empty_like(x_TD).uniform_(1.0 - self.scale, 1.0 + self.scale)

    def logits(self, logits_TE: Tensor, x_TD: Tensor) -> Tensor:
        """What the router chooses by instead of ``logits_TE``; ``x_TD``: what those were made from. Both fp32."""
        if not self.training or self.kind in ("none", "jitter"):
            return logits_TE
        if self.kind == "gumbel":
            return logits_TE + self.scale * gumbel_like(logits_TE)
        normal_TE = torch.randn_like(logits_TE)
        if self.kind == "gaussian":
            return logits_TE + self.scale * normal_TE
        if self.kind == "learned":
            return logits_TE + self.learned_std(x_TD) * normal_TE
        share = ((self.num_steps.float() + 1.0) / self.steps).clamp(max=1.0)
        return share * logits_TE + (1.0 - share) * (self.mean.float() + self.std.float() * normal_TE)

    def learned_std(self, x_TD: Tensor) -> Tensor:
        """Deviation of learned noise, ``softplus(x W^T)`` and at least ``STD_MIN``, fp32 [T, A]; x_TD: fp32."""
        return softplus(linear(x_TD, self.gate.float())).clamp_min(STD_MIN)

    @property
    def num_statistics(self) -> int:
        """Length of ``statistics``; 0 for noise that does not adapt."""
        return 3 if self.kind == "warmup" else 0

    def statistics(self, logits_TE: Tensor) -> Tensor:
        """Sum, sum of squares and number of the logits without noise, fp64, to be summed over micro-batches."""
        assert self.kind == "warmup"
        logits_TE = logits_TE.detach()
        number = torch.full((), logits_TE.numel(), dtype=torch.float64, device=logits_TE.device)
        return torch.stack([logits_TE.sum().double(), logits_TE.square().sum().double(), number])

    @torch.no_grad()
    def adjust(self, sum_S: Tensor) -> None:
        """Move to the next step. ``sum_S``: fp64, statistics summed over the step."""
        assert self.kind == "warmup"
        memory = torch.where(self.num_steps == 0, 0.0, MEMORY)
        mean, square = sum_S[:2] / sum_S[2].clamp_min(1.0)
        std = (square - mean.square()).clamp_min(0.0).sqrt()
        self.mean.copy_(memory * self.mean + (1.0 - memory) * mean)
        self.std.copy_(memory * self.std + (1.0 - memory) * std)
        self.num_steps.add_(1.0)
