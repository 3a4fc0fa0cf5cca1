"""What all ranks decide together at each step, by one small all-reduce: take it or skip it, go on, go back or leave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.config import HealthConfig
from moetrain.health.leave import Leave
from moetrain.health.outliers import Outliers
from moetrain.parallel.mesh import Mesh


@dataclass(frozen=True)
class BadStep:
    """Step number ``step`` (from 1) was skipped. loss: mean over ranks and micro-batches; norm: before clipping."""

    step: int
    reason: str
    loss: float
    norm: float


class Guard:
    """``cast`` before the optimiser's step, ``accepts`` within it, ``ended`` after it; every rank decides alike."""

    def __init__(self, config: HealthConfig, mesh: Mesh, leave: Leave) -> None:
        self._config, self._mesh, self._leave = config, mesh, leave
        self._outliers = Outliers(config.outlier_sigmas, config.outlier_window)
        self._ballot_X = torch.zeros(2, dtype=torch.float64, device=mesh.device)
        self._counting: dist.Work | None = None
        self._reason, self._loss, self._norm = "", 0.0, 0.0
        self.bad: list[BadStep] = []
        self.leaves = False

    def cast(self, loss: Tensor) -> None:
        """This rank's mean loss over the micro-batches of the step, and whether it was asked to leave."""
        self._ballot_X = torch.stack([loss.double(), loss.new_tensor(float(self._leave.asked)).double()])
        if self._mesh.world_group is not None:
            self._counting = dist.all_reduce(self._ballot_X, group=self._mesh.world_group, async_op=True)

    def accepts(self, norm: float) -> bool:
        """Whether the step is good: its gradient norm, the same on every rank, and the loss over all ranks."""
        if self._counting is not None:
            self._counting.wait()
            self._counting = None
        loss, leave = self._ballot_X.tolist()
        self._loss, self._norm, self.leaves = loss / self._mesh.world_size, norm, leave > 0
        self._reason = self._outliers.reason(self._loss, norm)
        return not self._reason

    def ended(self, step: int) -> BadStep | None:
        """Step number ``step`` is over: what was bad about it, if it was skipped. ``bad`` has those in a row."""
        if not self._reason:
            self.bad = []
            return None
        self.bad.append(BadStep(step, self._reason, self._loss, self._norm))
        return self.bad[-1]

    @property
    def goes_back(self) -> bool:
        """Whether so many steps in a row were bad that the run is to go back to a checkpoint."""
        return len(self.bad) >= self._config.max_bad_steps

    def state(self) -> dict[str, Any]:
        return self._outliers.state()

    def load(self, state: Mapping[str, Any]) -> None:
        self._outliers.load(state)
        self.bad = []
