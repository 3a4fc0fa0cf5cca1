"""Slices of stacked weights lent to every rank of a group for one forward and backward, as FasterMoE's shadows are (He
et al., PPoPP 2022). The owner keeps weight, gradient and optimiser state, so that nothing moves for good.

Bytes that a rank takes in for a slice of w: w in forward, by a broadcast from the owner, and as much in backward, where
a reduce sums the gradients up at the owner. (An all-reduce of zeros and slices would take in 2 w (G - 1) / G each
time.) Slices of one owner go together.

Started here and taken there, so that something else can be done meanwhile; in backward the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

Stacks = tuple[Tensor, ...]


@dataclass
class _Line:
    """What is lent: ``hot`` slices, the first of this rank's is ``first``. lent: the copies on their way out, or their
    gradients on their way back.
    """

    hot: tuple[int, ...]
    first: int
    group: ProcessGroup | None
    lent: list[Tensor] = field(default_factory=list)
    works: list[Any] = field(default_factory=list)

    def launch_out(self, stacks: Stacks) -> None:
        self.lent = [stack.new_empty(len(self.hot), *stack.shape[1:]) for stack in stacks]
        for stack_eX, lent_sX in zip(stacks, self.lent, strict=True):
            for place, local in self._mine(stack_eX.shape[0]):
                lent_sX[place] = stack_eX[local]
            if self.group is not None:
                for owner, some in self._by_owner(stack_eX.shape[0]):
                    self.works.append(dist.broadcast(lent_sX[some], group_src=owner, group=self.group, async_op=True))

    def launch_back(self, grads: Stacks, num_local: int) -> None:
        self.lent = [grad_sX.contiguous() for grad_sX in grads]
        if self.group is not None:
            for grad_sX in self.lent:
                for owner, some in self._by_owner(num_local):
                    self.works.append(dist.reduce(grad_sX[some], group_dst=owner, group=self.group, async_op=True))

    def land(self) -> Stacks:
        """Wait for what was launched."""
        for work in self.works:
            work.wait()
        landed, self.lent, self.works = tuple(self.lent), [], []
        return landed

    def add_to(self, grads: Stacks) -> None:
        """The gradients that have come back, to the owner's."""
        for grad_eX, grad_sX in zip(grads, self.land(), strict=True):
            for place, local in self._mine(grad_eX.shape[0]):
                grad_eX[local] += grad_sX[place]

    def _mine(self, num_local: int) -> list[tuple[int, int]]:
        """Where this rank's own slices stand among those that are lent, and in its stack."""
        here = range(self.first, self.first + num_local)
        return [(place, one - self.first) for place, one in enumerate(self.hot) if one in here]

    def _by_owner(self, num_local: int) -> list[tuple[int, slice]]:
        """Each rank of the group that lends any, and which."""
        places = groupby(range(len(self.hot)), lambda place: self.hot[place] // num_local)
        runs = [(owner, list(run)) for owner, run in places]
        return [(owner, slice(run[0], run[-1] + 1)) for owner, run in runs]


@dataclass(frozen=True)
class Loan:
    """own: the stacks, to be used in their place. tokens: no numbers yet, they stand in the autograd graph for the
    copies that will arrive.
    """

    own: Stacks
    tokens: Stacks
    line: _Line


def start_loan(stacks: Stacks, hot: tuple[int, ...], first: int, group: ProcessGroup | None) -> Loan:
    """Lend the slices ``hot`` (global ids, ascending, at least one, the same on all ranks) of stacks [e, ...], of which
    this rank holds ``first`` ... ``first + e - 1``. Every rank of the group takes part in forward and in backward,
    whether it has a use for the copies or not.

    In backward the gradients of the copies, summed over the group in their dtype, are added to the owner's slices in
    the gradient of ``own``, in place: let it be nobody else's, and let there be one.
    """
    assert len(hot) > 0
    assert all(one < other for one, other in pairwise(hot)), hot
    line = _Line(hot, first, group)
    out: Stacks = _Start.apply(line, *stacks)
    return Loan(out[: len(stacks)], out[len(stacks) :], line)


def take_loan(loan: Loan) -> Stacks:
    """The copies [s, ...], in the order of ``hot``. Differentiable; once for each loan."""
    out: Stacks = _Take.apply(loan.line, loan.own[0].shape[0], *loan.tokens)
    return out


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, line: _Line, *stacks: Tensor) -> Stacks:
        ctx.line = line
        line.launch_out(stacks)
        tokens = [stack.new_zeros(()).expand(len(line.hot), *stack.shape[1:]) for stack in stacks]
        return (*[stack.view_as(stack) for stack in stacks], *tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        own = grads[: len(grads) // 2]
        ctx.line.add_to(own)
        return None, *own


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, line: _Line, num_local: int, *tokens: Tensor) -> Stacks:
        ctx.line, ctx.num_local = line, num_local
        return line.land()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.line.launch_back(grads, ctx.num_local)
        return None, None, *grads
