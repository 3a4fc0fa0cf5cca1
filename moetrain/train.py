"""From a checked config to a finished run: corpus, mesh, run folder, trainer."""

from __future__ import annotations

import os

import torch

from moetrain.checks import ep_size_of
from moetrain.compose import resolved_yaml
from moetrain.config import Config
from moetrain.data import prepare
from moetrain.monitor.origin import origin
from moetrain.monitor.runfolder import RunFolder, open_run_folder, rank_log
from moetrain.parallel.collectives import barrier, broadcast_text, gather_equal
from moetrain.parallel.mesh import Mesh, close_mesh, init_mesh
from moetrain.plan import main_report
from moetrain.trainer import Trainer
from moetrain.types import ConfigError, Problem

DIVERGED = 1


def main(config: Config) -> int:
    """Run it on the world that torchrun describes in the environment, or on one process. Returns the exit code: 0, or
    1 if the loss at the end is not finite.

    Everything that can be found wrong without other ranks is found before a process group exists. Raises ConfigError.
    """
    if config.debug.fake_world is not None:
        if os.environ.get("RANK", "0") == "0":
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
        check_shared(folder, mesh)
        with rank_log(folder, mesh.rank):
            finite = Trainer(config, mesh, corpus, folder).fit()
            barrier(mesh.world_group)
    finally:
        close_mesh()
    return 0 if finite else DIVERGED


def check_shared(folder: RunFolder, mesh: Mesh) -> None:
    """All ranks write checkpoints into one folder: find out before the first step that some of them do not see it."""
    seen = torch.tensor([folder.record.is_file()], dtype=torch.int64, device=mesh.device)
    blind = [rank for rank, row in enumerate(gather_equal(seen, mesh.world_group).tolist()) if not row[0]]
    if blind:
        reason = f"ranks {blind} do not see {folder.record}, which rank 0 has just written"
        fix = "put run.root on storage that all hosts share"
        raise ConfigError([Problem("run.root", str(folder.path.parent), reason, fix)])
