"""Decisions of one forward, kept so that activation recompute cannot decide otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Replay:
    """Made anew for every forward of a layer and handed down; the recompute of that forward is handed the same one.

    A near-tie that falls the other way in recompute would change shapes, or worse, only the gradient.
    """

    decisions: dict[str, Tensor] = field(default_factory=dict)

    def once(self, name: str, decide: Callable[[], Tensor]) -> Tensor:
        """What ``decide`` (no gradient) gave the first time that ``name`` was asked for in this forward."""
        if name not in self.decisions:
            self.decisions[name] = decide()
        return self.decisions[name]
