"""The rates of the cost model, measured on the ranks and with the shapes of the run, in some tenths of a second."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor

from moetrain.checks import traits_of
from moetrain.config import Config
from moetrain.control.cost import Rates
from moetrain.moe.dispatch.base import Dispatcher, Sharded
from moetrain.moe.experts import Experts, one_row_each
from moetrain.moe.layer import MoELayer
from moetrain.parallel.collectives import barrier, gather_equal, gather_texts
from moetrain.parallel.exchange import Route, all_to_all_rows
from moetrain.parallel.machine import processor
from moetrain.parallel.mesh import Mesh
from moetrain.parallel.share import start_loan, take_loan
from moetrain.types import Dispatched

ROUNDS = 5
MIN_ROWS, MAX_ROWS, MAX_COPIES = 16, 512, 4096


def measured_on(config: Config, mesh: Mesh) -> dict[str, object]:
    """What rates hold for, plain JSON, the same on every rank. Collective."""
    kind = mesh.device.type
    name = processor() if kind == "cpu" else torch.get_device_module(mesh.device).get_device_name(mesh.device)
    return {
        "devices": sorted(set(gather_texts(f"{kind} {name}", mesh.world_group))),
        "world_size": mesh.world_size,
        "ep_size": mesh.ep_size,
        "dispatch": dict(config.dispatch),
        "experts_kernel": config.machine.experts_kernel,
    }


def measure_rates(config: Config, layer: MoELayer, mesh: Mesh) -> Rates:
    """The same on every rank: each time the best of some rounds, of the rank that was slowest. Collective.

    layer: any; it is left as it is.
    """
    experts = layer.experts
    stacks = tuple(stack.detach()[:1].clone().requires_grad_() for stack in experts.stacks())
    num_tokens = config.train.micro_batch * config.model.context
    per_expert = num_tokens * mesh.ep_size * traits_of(config).experts_per_token / config.experts.num_experts
    num_rows = min(max(round(per_expert), MIN_ROWS), MAX_ROWS)
    dim, each = config.model.dim, -(-min(num_tokens, MAX_COPIES) // mesh.ep_size)
    rows_RD, copies_CD = (stacks[0].new_ones(n, dim).requires_grad_() for n in (num_rows, each * mesh.ep_size))
    seconds = [
        _best(_rows(experts, stacks, rows_RD), mesh) / num_rows,
        _best(_copies(layer.dispatcher, copies_CD, mesh), mesh) / max(each * (mesh.ep_size - 1), 1),
        _best(_loan(stacks, mesh), mesh),
    ]
    slowest = gather_equal(torch.tensor(seconds, dtype=torch.float64, device=mesh.device), mesh.world_group).amax(0)
    row, copy, loan = slowest.tolist()
    return Rates(row, copy, loan, mesh.ep_size)


def _rows(experts: Experts, stacks: tuple[Tensor, ...], x_RD: Tensor) -> Callable[[], object]:
    """Through one expert."""
    ends_e = torch.full((1,), x_RD.shape[0], dtype=torch.int32, device=x_RD.device)
    given = Dispatched(x_RD, one_row_each(x_RD), None, ends_e, None, 0)
    grad_RD = torch.ones_like(x_RD)

    def run() -> object:
        return torch.autograd.grad(experts(given, stacks), (x_RD, *stacks), grad_RD)

    return run


def _copies(dispatcher: Dispatcher, x_CD: Tensor, mesh: Mesh) -> Callable[[], object]:
    """Out and home, and the gradients the same ways back, as many to each rank, under the dispatcher's payload.

    Not modelled: the second hop of ``hierarchical`` and what it saves, tags, and chunks. A dispatcher of one's own is
    taken to send rows as they are.
    """
    grad_CD = torch.ones_like(x_CD)
    out = home = Route(None, None, mesh.ep_group)
    if isinstance(dispatcher, Sharded):
        out, home = dispatcher.route(None, None), dispatcher.home(None, None)

    def run() -> object:
        return torch.autograd.grad(all_to_all_rows(all_to_all_rows(x_CD, out), home), x_CD, grad_CD)

    return run


def _loan(stacks: tuple[Tensor, ...], mesh: Mesh) -> Callable[[], object]:
    """Of one expert, as if each rank had one, and its gradients back."""
    grads = [torch.zeros_like(stack) for stack in (*stacks, *stacks)]

    def run() -> object:
        loan = start_loan(stacks, (0,), mesh.ep_rank, mesh.ep_group)
        return torch.autograd.grad((*loan.own, *take_loan(loan)), stacks, grads)

    return run


def _best(run: Callable[[], object], mesh: Mesh) -> float:
    """Seconds, after a round for warming up; all ranks begin together."""
    found = []
    for _ in range(1 + ROUNDS):
        barrier(mesh.world_group)
        start = perf_counter()
        run()
        if mesh.device.type != "cpu":
            torch.accelerator.synchronize()
        found.append(perf_counter() - start)
    return min(found[1:])
