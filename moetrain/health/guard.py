"""What all ranks decide together at each step, by one small all-reduce: take it or skip it, go on, go back or leave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moetrain.config import HealthConfig
from moetrain.health.leave import Leave, Left
from moetrain.health.outliers import Outliers
from moetrain.parallel.collectives import gather_texts, sum_over
from moetrain.parallel.mesh import Mesh


@dataclass(frozen=True)
class BadStep:
    """Step number ``step`` (from 1) was skipped."""

    step: int
    reason: str


class Guard:
    """``cast`` before the optimiser's step, ``accepts`` within it, ``ended`` after it; every rank decides alike."""

    def __init__(self, config: HealthConfig, mesh: Mesh, leave: Leave) -> None:
        self._config, self._mesh, self._leave = config, mesh, leave
        self._outliers = Outliers(config.outlier_sigmas, config.outlier_window)
        self._ballot_X = torch.zeros(3, dtype=torch.float64, device=mesh.device)
        self._reason = ""
        self.bad: list[BadStep] = []
        self.leaves = self.saves = False

    def cast(self, loss: Tensor) -> None:
        """This rank's mean loss over the micro-batches of the step, and what it was asked: to leave, to save."""
        asked = loss.new_tensor([self._leave.asked, self._leave.takes_save()], dtype=torch.float64)
        self._ballot_X = torch.cat([loss.double().view(1), asked])

    def accepts(self, norm: float) -> bool:
        """Whether the step is good: its gradient norm and its loss, means over all ranks. Collective.

        The norm is voted on too: ranks add up equal gradients by themselves, and on unlike machines the last bits of
        the sums may differ, which is enough for some to take a step at the limit and others not.
        """
        votes_X = torch.cat([self._ballot_X, self._ballot_X.new_tensor([norm])])
        loss, leave, save, norm = sum_over(votes_X, self._mesh.world_group).tolist()
        self.leaves, self.saves = leave > 0, save > 0
        self._reason = self._outliers.reason(loss / self._mesh.world_size, norm / self._mesh.world_size)
        return not self._reason

    def hear(self) -> bool:
        """Where time has passed since the vote: whether any rank was asked to leave by now. Collective."""
        asked = torch.tensor(self._leave.asked, dtype=torch.float64, device=self._mesh.device)
        self.leaves = bool(sum_over(asked, self._mesh.world_group).item())
        return self.leaves

    def left(self, step: int) -> Left:
        """The run is left after ``step`` steps: why. Collective."""
        reasons = gather_texts(self._leave.reason, self._mesh.world_group)
        return Left(step, "; ".join(reason for reason in reasons if reason))

    def ended(self, step: int) -> BadStep | None:
        """Step number ``step`` is over: what was bad about it, if it was skipped. ``bad`` has those in a row."""
        if not self._reason:
            self.bad = []
            return None
        self.bad.append(BadStep(step, self._reason))
        return self.bad[-1]

    @property
    def goes_back(self) -> bool:
        """Whether so many steps in a row were bad that the run is to go back to a checkpoint."""
        return len(self.bad) >= self._config.max_bad_steps

    def state(self) -> dict[str, Any]:
        """Plain JSON, for the checkpoint: a run that is resumed among bad steps goes on counting."""
        return self._outliers.state() | {"bad": [[one.step, one.reason] for one in self.bad]}

    def load(self, state: Mapping[str, Any]) -> None:
        self._outliers.load(state)
        self.bad = [BadStep(step, reason) for step, reason in state.get("bad", [])]
