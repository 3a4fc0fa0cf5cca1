"""Bytes of one rank, from the layout alone: what stays between steps, and what comes on top within one.

DeepSpeed's shares are those of 0.19.8, found by counting live tensors: in fp32 its ZeRO 1 and 2 keep a master beside
the weights, collect gradients in a bucket, and hold what micro-batches have added up until the step. ZeRO 2 in bf16 is
fullest in the step itself, where a rank's gradients are there twice, beside what Adam makes for one group of
parameters. ZeRO 3 never lets go of its bucket; the weights of less than 100,000 numbers each, which it keeps whole on
every rank, are not counted between steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moetrain.config import Config
from moetrain.engine.base import MAX_BUCKET
from moetrain.parallel.mesh import weight_dtype

GATHERED = 1_000_000_000
"""Values: DeepSpeed's own limit on weights of ZeRO 3 that are whole at once."""


@dataclass(frozen=True)
class PlannedMemory:
    """Bytes between steps (weights, gradients with a bucket that stays, optimizer with the masters that are not the
    weights themselves), and what comes on top at the fullest moment of a step besides activations (``work``), or
    instead of them where that is more (``reduction``).
    """

    weights: int
    gradients: int
    optimizer: int
    work: int
    reduction: int

    @property
    def state(self) -> int:
        return self.weights + self.gradients + self.optimizer

    def peak(self, activations: int) -> int:
        """The most at once. activations: the most that forward and backward of a micro-batch have alive."""
        return self.state + self.work + max(activations, self.reduction)


def device_of(config: Config) -> torch.device:
    """What a run would take here: auto is CUDA where torch sees it."""
    kind = config.machine.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(kind)


def value_bytes(config: Config) -> int:
    """Of a weight in forward."""
    return weight_dtype(config.engine, device_of(config)).itemsize


def planned_memory(
    dense: int, experts: int, world_size: int, ep_size: int, accumulation: int, config: Config
) -> PlannedMemory:
    """dense, experts: parameters on this rank, replicated over the world and over its expert-data-parallel group."""
    stage, value, all_here = config.engine.zero_stage, value_bytes(config), dense + experts
    shares = dense // world_size, experts // (world_size // ep_size)
    share = sum(shares)
    moments, mixed = {"adamw": 8, "sgd": 0}[config.optim.name], value < 4
    bucket, piled = 4 * min(MAX_BUCKET, all_here), accumulation > 1
    if stage == 0:
        flat = 4 * (max(dense, experts) if ep_size > 1 else all_here)
        reduction = flat if config.engine.name == "deepspeed" and world_size > 1 else 0
        masters = 4 * all_here if mixed else 0
        return PlannedMemory(value * all_here, 4 * all_here, moments * all_here + masters, 0, reduction)
    optimizer = (4 + moments) * share
    if stage == 1 and mixed:
        return PlannedMemory(value * all_here, 4 * all_here, optimizer, 0, bucket)
    if stage == 1:
        return PlannedMemory(value * all_here, 0, optimizer, bucket + piled * 4 * all_here, 0)
    if stage == 2 and mixed:
        added, group = piled * 4 * share, max(shares) if ep_size > 1 else share
        return PlannedMemory(value * all_here, 0, optimizer, added, 8 * share + 4 * group - added)
    if stage == 2:
        return PlannedMemory(value * all_here, 0, optimizer, bucket + piled * 4 * share, bucket)
    gathered = value * min(all_here - share, GATHERED)
    return PlannedMemory(value * share, 4 * share + bucket, optimizer, gathered, bucket)
