"""From a checked config to a finished run: corpus, mesh, run folder, trainer."""

from __future__ import annotations

import os

import torch

from moetrain.checks import ep_size_of
from moetrain.compose import resolved_yaml
from moetrain.config import Config
from moetrain.data import prepare
from moetrain.monitor.origin import origin
from moetrain.monitor.runfolder import open_run_folder, rank_log
from moetrain.parallel.collectives import broadcast_text
from moetrain.parallel.mesh import close_mesh, init_mesh
from moetrain.plan import main_report
from moetrain.trainer import Trainer


def main(config: Config) -> int:
    """Run it on the world that torchrun describes in the environment, or on one process. Returns the exit code.

    Everything that can be found wrong without other ranks is found before a process group exists. Raises ConfigError.
    """
    if config.debug.fake_world is not None:
        print(main_report(config, config.debug.fake_world))
        return 0
    if config.machine.threads is not None:
        torch.set_num_threads(config.machine.threads)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    corpus = prepare(config.data, context=config.model.context, vocab_size=config.model.vocab_size)
    mesh = init_mesh(ep_size_of(config, world_size), config.machine)
    try:
        text = resolved_yaml(config)
        folder = open_run_folder(
            config, text, mesh.rank, lambda t: broadcast_text(t, mesh.world_group), origin(mesh.world_size)
        )
        with rank_log(folder, mesh.rank):
            Trainer(config, mesh, corpus, folder).fit()
    finally:
        close_mesh()
    return 0
