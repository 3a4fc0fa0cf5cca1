"""Choices of one forward, kept so that activation recompute cannot choose otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Replay:
    """Made anew for every forward of a layer and handed down; the recompute of that forward is handed the same one.

    A near-tie that falls the other way in recompute would change shapes, or worse, only the gradient.
    """

    expert_TK: Tensor | None = None

    def choose(self, select: Callable[[], Tensor]) -> Tensor:
        """What ``select`` chose the first time. expert_TK: int64."""
        if self.expert_TK is None:
            self.expert_TK = select()
        return self.expert_TK
