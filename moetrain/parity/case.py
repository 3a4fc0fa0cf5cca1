"""What one comparison is: a block of transformers, and the settings of moetrain that must equal it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moetrain.parity.layouts import Layout

DIM, WIDTH = 32, 40  # of every case: model width and the width of one expert
NUM_SEQUENCES, SEQUENCE = 2, 24
OUTPUT_BOUND, GRADIENT_BOUND = 1e-6, 1e-5

Finish = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
"""(what the MoE layer gave [T, D], the reference block's tensors) -> what the block gives [T, D]."""


@dataclass(frozen=True)
class Case:
    """A block class of ``transformers.models`` with tiny arguments, and the option of conf/router that is its router.

    model, block, config: the folder of the model, the class of the block and that of its config. arguments: of the
    config. block_arguments: of the block, beside the config. takes_tokens: the block is also given token ids. router:
    the option; ``overrides`` go over its keys, ``experts`` and ``capacity`` over those sections of a dropless layer of
    eight experts. layout: which tensors of the block are ours. finish: what the block does to the sum of its experts
    and the layer does not, because it belongs to the decoder around it; ``around`` says in words what that is. std: of
    the normal distribution that weights are drawn from, such that outputs are about 1.
    """

    name: str
    model: str
    block: str
    config: str
    arguments: Mapping[str, Any]
    router: str
    layout: Layout
    overrides: Mapping[str, Any] = field(default_factory=dict)
    experts: Mapping[str, Any] = field(default_factory=dict)
    capacity: Mapping[str, Any] = field(default_factory=dict)
    block_arguments: Mapping[str, Any] = field(default_factory=dict)
    takes_tokens: bool = False
    finish: Finish | None = None
    around: str = ""
    std: float = 0.2

    @property
    def path(self) -> str:
        """The dotted path of the block class."""
        return f"transformers.models.{self.model}.modeling_{self.model}.{self.block}"


@dataclass(frozen=True)
class Measured:
    """How far apart a case lay. output_error: the largest absolute difference. gradient_error: the largest difference
    of any gradient (router, experts, shared experts, input), relative to the largest entry of that gradient.
    output_rms: root mean square of the block's output, to see what the errors are small against.
    """

    name: str
    block: str
    router: str
    output_error: float
    gradient_error: float
    output_rms: float
    num_tokens: int
    num_experts: int
    dim: int
    expert_dim: int
