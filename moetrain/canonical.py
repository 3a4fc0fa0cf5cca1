"""What is trained, by names that do not know how it is laid out: one tensor a parameter, one a global expert.

::

    weight/blocks.0.attention.qkv                        fp32, also where the model computes in bf16
    weight/blocks.1.moe.experts.gate_up/00012            the slice of expert 12, whichever rank holds it
    optimizer/exp_avg/blocks.1.moe.experts.gate_up/00012
    optimizer/step
    buffer/blocks.1.moe.router.bias_E

A rank holds stretches of these tensors: all of them (replicated), experts of its own, or what ZeRO left it, which
begins and ends anywhere. So a stretch is a run of elements of the flattened tensor, not a box.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from moetrain.parallel.mesh import Mesh

STEP = "optimizer/step"
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Spec:
    """A canonical tensor as a whole; dtype in the words of safetensors."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_values(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Piece:
    """values_X: elements start, start + 1, ... of the tensor ``key``, flattened. A view of what the engine trains."""

    key: str
    start: int
    values_X: Tensor


@dataclass(frozen=True)
class State:
    """Valid until the engine's next step.

    tensors: every tensor of the whole model, the same on every rank. held: what this rank trains with, so what it must
    be given on loading. shares: what this rank writes on saving; over all ranks every element exactly once.
    """

    tensors: Mapping[str, Spec]
    held: Sequence[Piece]
    shares: Sequence[Piece]


@dataclass(frozen=True)
class Stretch:
    """``size`` elements of this rank's parameter ``name`` from ``start`` on, which lie in a flat tensor from ``at`` on.

    The flat tensor is a master: fp32, 1-D, what the optimiser updates.
    """

    name: str
    start: int
    size: int
    master: Tensor
    at: int

    def within(self, begin: int, end: int) -> Stretch:
        """The part (it may be empty) that lies in master[begin:end]."""
        first, last = max(self.at, begin), min(self.at + self.size, end)
        return Stretch(self.name, self.start + first - self.at, max(0, last - first), self.master, first)


class Names:
    """Canonical names and shapes of a model's parameters. Made before ZeRO 3 takes their shapes away."""

    def __init__(self, model: nn.Module, mesh: Mesh) -> None:
        assert all(p.requires_grad for p in model.parameters()), "what is not trained is a buffer"
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._stacked = model.expert_names()
        self._ep_size, self._ep_rank = mesh.ep_size, mesh.ep_rank

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors that the parameters of all ranks make up."""
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in self._shapes.items():
            if name in self._stacked:
                num_experts = shape[0] * self._ep_size
                found |= {_of_expert(name, expert): shape[1:] for expert in range(num_experts)}
            else:
                found[name] = shape
        return found

    def cut(self, stretch: Stretch) -> Iterator[Stretch]:
        """The same elements under canonical names: stacked ones are cut where an expert ends."""
        if stretch.name not in self._stacked:
            if stretch.size:
                yield stretch
            return
        num_local, *shape = self._shapes[stretch.name]
        each, first = prod(shape), self._ep_rank * num_local
        at, start, left = stretch.at, stretch.start, stretch.size
        while left > 0:
            size = min(left, each - start % each)
            yield Stretch(_of_expert(stretch.name, first + start // each), start % each, size, stretch.master, at)
            at, start, left = at + size, start + size, left - size


def weight_pieces(model: nn.Module, mesh: Mesh) -> State:
    """Weights and buffers of a bare model, without any optimiser; to be loaded."""
    names, held = Names(model, mesh), []
    for name, param in model.named_parameters():
        whole = Stretch(name, 0, param.numel(), param.detach().view(-1), 0)
        held += [Piece(f"weight/{s.name}", s.start, s.master[s.at : s.at + s.size]) for s in names.cut(whole)]
    tensors = {f"weight/{name}": Spec("F32", shape) for name, shape in names.shapes().items()}
    buffers = persistent_buffers(model)
    held += [Piece(f"buffer/{name}", 0, buffer.view(-1)) for name, buffer in buffers.items()]
    return State(tensors | buffer_specs(buffers), held, [])


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the weights (a router's bias, say), by name."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def buffer_specs(buffers: Mapping[str, Tensor]) -> dict[str, Spec]:
    return {f"buffer/{name}": Spec(DTYPES[b.dtype], tuple(b.shape)) for name, b in buffers.items()}


def _of_expert(name: str, expert: int) -> str:
    return f"{name}/{expert:05d}"
