"""What every MoE layer decides, seen by hooks on modules that return it: the model itself has no code for this."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moetrain.models.block import Block
from moetrain.models.decoder import Decoder
from moetrain.models.mixture_of_depths import Depth, DepthBlock
from moetrain.moe.capacity import Capacity
from moetrain.moe.experts import Experts
from moetrain.moe.routers.base import Router
from moetrain.types import Batch, Placement, RouterInput


@dataclass(frozen=True, eq=False)
class Seen:
    """The parts of one MoE layer, and one micro-batch of B sequences of S tokens, of which it was given T.

    place_T: int64, where each of the T rows stands among the B*S tokens; all of them, in order, but in a block that
    tokens may pass by.
    """

    router: Router
    capacity: Capacity
    experts: Experts
    given: RouterInput
    placement: Placement
    place_T: Tensor

    @property
    def layer(self) -> int:
        """The index of its block, from 0."""
        return self.router.site.layer


def observe(model: Decoder, batch: Batch, *, train_capacity: bool) -> tuple[list[Seen], float]:
    """Run the model in evaluation mode on one micro-batch -> what each MoE layer did, by depth, and the loss in nats.

    train_capacity: give experts the slots that they have in training instead of those of evaluation.
    """
    assert not model.training
    with torch.no_grad(), _watched(model, train_capacity) as found:
        loss = float(model(batch.to(model.mesh.device)).lm)
    return found, loss


@contextmanager
def _watched(model: Decoder, train_capacity: bool) -> Iterator[list[Seen]]:
    found: list[Seen] = []
    handles = []
    for block in model.blocks:
        assert isinstance(block, Block)
        if block.is_moe:
            block.moe.capacity.train(train_capacity)
            handles += _watch(block, found)
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        model.eval()


def _watch(block: Block, found: list[Seen]) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks on one block, which run in this order: who goes through it, what the router is given, the placement."""
    moe, latest = block.moe, dict[str, Any]()

    def of_depth(module: nn.Module, args: tuple[Any, ...], out: Depth) -> None:
        latest["place"] = out.predicted_BS.flatten().nonzero().squeeze(1)

    def of_router(module: nn.Module, args: tuple[Any, ...], out: object) -> None:
        latest["given"] = args[0]

    def of_capacity(module: nn.Module, args: tuple[Any, ...], out: Placement) -> None:
        given = latest["given"]
        everyone_T = torch.arange(given.x_TD.shape[0], device=given.x_TD.device)
        place_T = latest.get("place", everyone_T)
        found.append(Seen(moe.router, moe.capacity, moe.experts, given, out, place_T))

    handles = [moe.router.register_forward_hook(of_router), moe.capacity.register_forward_hook(of_capacity)]
    if isinstance(block, DepthBlock):
        handles.append(block.depth.register_forward_hook(of_depth))
    return handles
