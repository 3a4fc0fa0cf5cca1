"""Which blocks of transformers each router was measured against, as recorded, or measured again here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from moetrain.compose import ROUTER, option_values
from moetrain.parity.block import transformers_version
from moetrain.parity.case import Measured
from moetrain.parity.cases import CASES
from moetrain.parity.measure import measure
from moetrain.parity.record import Record


@dataclass(frozen=True)
class Reference:
    """All comparisons of one option, some of them with settings of their own (another k, say)."""

    measured: tuple[Measured, ...]

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of the classes, each once; first those of the model that the option is named after."""
        ordered = sorted(self.measured, key=_strangeness)
        return tuple(dict.fromkeys(one.block.rpartition(".")[2] for one in ordered))

    @property
    def output_error(self) -> float:
        """The worst of them: the largest absolute difference of an output whose size is about 1."""
        return max(one.output_error for one in self.measured)

    @property
    def gradient_error(self) -> float:
        """The worst of them: the largest difference of a gradient, relative to the largest entry of that gradient."""
        return max(one.gradient_error for one in self.measured)


def by_router(measured: Iterable[Measured]) -> dict[str, Reference]:
    """Gathered by the options of conf/router."""
    found: dict[str, list[Measured]] = {}
    for one in measured:
        found.setdefault(one.router, []).append(one)
    return {name: Reference(tuple(several)) for name, several in found.items()}


def _strangeness(one: Measured) -> int:
    """0 for a comparison named as its option, 1 for one whose name begins so, 2 for any other."""
    return 0 if one.name == one.router else 1 if one.name.startswith(one.router) else 2


def measured_again() -> Record:
    """Every comparison done here and now. Raises ConfigError if transformers is missing."""
    version = transformers_version()
    values = option_values(ROUTER, list({case.router: None for case in CASES}))
    return Record(torch.__version__, version, tuple(measure(CASES, values.__getitem__)))
