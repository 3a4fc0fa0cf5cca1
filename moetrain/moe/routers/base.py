"""The contract of a router: tokens in, a ``Routing`` out; what it learns outside of the gradient, once a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moetrain.moe.replay import Replay
from moetrain.ops.init import Draw
from moetrain.types import RouterInput, RouterSite, RouterTraits, Routing


@dataclass(frozen=True)
class StepSeen:
    """One optimiser step over all ranks and micro-batches, as an adaptive router sees it.

    layer: which of the L MoE layers is asked. counts_LE: int64, assignments before dropping. statistics_LS: fp64, sums
    of ``statistics()``. num: how many micro-batches of ranks those are sums of.
    """

    layer: int
    counts_LE: Tensor
    statistics_LS: Tensor
    num: int

    @property
    def counts_E(self) -> Tensor:
        return self.counts_LE[self.layer]


class Router(nn.Module, ABC):
    """A subclass takes ``site`` and its own parameters, all keyword-only, and tells its ``traits`` for them.

    It may have a static ``problems(*, num_experts, **own) -> list[Problem]`` that says which settings cannot work.
    ``traits`` and ``problems`` get every own parameter, the defaults of ``__init__`` filled in: they name those that
    they look at, without defaults, and take the others as ``**_``.
    State that is not trained by the gradient (a bias, a threshold) lives in persistent fp32 buffers and moves in
    ``adjust`` only. Forward never changes state: recompute runs it twice, evaluation must leave no trace.
    """

    traits: Callable[..., RouterTraits]
    """Static: ``traits(*, num_experts, **own)``, what the router is like with these settings."""
    bias_rate = 0.0
    """How far ``adjust`` moves the bias, of those that have one; may be set between steps."""

    def __init__(self, site: RouterSite) -> None:
        super().__init__()
        self.site = site
        self._latest_S: Tensor | None = None

    @abstractmethod
    def init_weights(self, draw: Draw, std: float) -> None:
        """Fill the parameters."""

    @abstractmethod
    def forward(self, given: RouterInput, replay: Replay) -> Routing:
        """The choice of every token. Non-differentiable decisions go through ``replay.once``."""

    @property
    def adapts(self) -> bool:
        """Whether ``adjust`` is to be called after each optimiser step."""
        return False

    def observe(self, statistics_S: Tensor) -> None:
        """For forward in training: what this micro-batch says (any float dtype, fixed length); only kept, not added."""
        self._latest_S = statistics_S.detach().double()

    def statistics(self) -> Tensor:
        """What the latest training micro-batch said, fp64 [S]; empty for a router that goes by counts alone."""
        if self._latest_S is None:
            return torch.zeros(0, dtype=torch.float64, device=self.site.device)
        latest_S, self._latest_S = self._latest_S, None
        return latest_S

    def adjust(self, seen: StepSeen) -> None:
        """Move buffers, in place, by what all ranks saw in the step. The same on every rank."""
        raise NotImplementedError

    def numbers(self) -> dict[str, Tensor]:
        """What the log shall say of the buffers: scalars by name, few whatever E is."""
        return {}
