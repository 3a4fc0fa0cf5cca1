"""Initial weights as a function of (seed, parameter name, global expert id), never of rank, layout or order of
creation.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """Fills parameters in place from generators of their own; ``prefix`` is the path of the module that draws."""

    seed: int
    prefix: str = ""

    def of(self, name: str) -> Draw:
        """The same source for a submodule."""
        return Draw(self.seed, f"{self.prefix}{name}.")

    def normal_(self, weight: Tensor, name: str, std: float) -> None:
        """N(0, std) into the parameter called ``name`` of this module."""
        self._fill(weight, name, std)

    def generator(self, name: str) -> torch.Generator:
        """On the CPU, a function of (seed, path of the module, name): for tables and other initial values."""
        digest = hashlib.sha256(f"{self.seed}/{self.prefix}{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))

    def experts_(self, weight_eXX: Tensor, name: str, std: float, first_expert: int) -> None:
        """N(0, std) into stacked expert weights, whose first slice is the global expert ``first_expert``."""
        for local, weight in enumerate(weight_eXX.detach().unbind(0)):
            self._fill(weight, f"{name}[{first_expert + local}]", std)

    def _fill(self, weight: Tensor, name: str, std: float) -> None:
        if weight.is_meta:
            return
        with torch.no_grad():
            values = torch.empty(weight.shape, dtype=torch.float32)
            weight.copy_(values.normal_(0.0, std, generator=self.generator(name)))
