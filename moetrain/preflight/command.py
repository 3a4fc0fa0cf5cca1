"""``moetrain preflight``: the checks that a run begins with, and nothing after them."""

from __future__ import annotations

import os
from time import perf_counter

import torch
from rich.console import Console

from moetrain.checks import ep_size_of, fitted
from moetrain.config import Config
from moetrain.data import prepare
from moetrain.monitor.origin import origin
from moetrain.parallel.collectives import barrier
from moetrain.parallel.mesh import close_mesh, init_mesh
from moetrain.preflight.world import check_host, examine, table


def main(config: Config, console: Console) -> int:
    """On the world that torchrun describes in the environment, or alone. Rank 0 draws the table. Returns the exit code:
    0, or 1 if something is wrong that would keep a run from starting. Raises ConfigError.
    """
    if config.machine.threads is not None:
        torch.set_num_threads(config.machine.threads)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check_host(config)
    corpus = prepare(config.data, context=config.model.context, vocab_size=config.model.vocab_size)
    config = fitted(config, world_size)
    mesh = init_mesh(ep_size_of(config, world_size), config.machine)
    try:
        began = perf_counter()
        findings = examine(config, mesh, corpus, origin(mesh.world_size))
        if mesh.is_main:
            console.print(table(findings, perf_counter() - began))
        barrier(mesh.world_group)
    finally:
        close_mesh()
    return int(any(one.fatal and not one.ok for one in findings))
