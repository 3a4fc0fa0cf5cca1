"""From a checked config to a finished run: corpus, mesh, run folder, trainer."""

from __future__ import annotations

import os
import sys

import torch

from moetrain.checks import ep_size_of, fitted, refit
from moetrain.compose import resolved_yaml
from moetrain.config import Config
from moetrain.data import Corpus, prepare
from moetrain.health import Leave, Unstable, Watchdog, die_with_torchrun, record_collectives
from moetrain.monitor.origin import origin
from moetrain.monitor.runfolder import RunFolder, open_run_folder, rank_log, read_record
from moetrain.parallel.collectives import barrier, broadcast_text
from moetrain.parallel.mesh import Mesh, close_mesh, init_mesh
from moetrain.plan import main_report
from moetrain.preflight import check_host, examine, refuse, warnings
from moetrain.trainer import Trainer

DIVERGED = 1


def main(config: Config) -> int:
    """Run it on the world that torchrun describes in the environment, or on one process. Returns the exit code: 0, or
    1 if the loss at the end is not finite or the run has stopped itself (rank 0 has told why). 0 also if it was left,
    saved, because a rank was asked to; then the run folder holds the file ``requeue``, until the next start.

    Everything that can be found wrong without other ranks is found before a process group exists. Raises ConfigError.
    """
    if config.debug.fake_world is not None:
        if os.environ.get("RANK", "0") == "0":
            print(main_report(config, config.debug.fake_world))
        return 0
    die_with_torchrun()
    record_collectives()
    if config.machine.threads is not None:
        torch.set_num_threads(config.machine.threads)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    corpus = prepare(config.data, context=config.model.context, vocab_size=config.model.vocab_size)
    here = fitted(config, world_size)
    if config.health.preflight:
        check_host(config)
    mesh = init_mesh(ep_size_of(here, world_size), config.machine)
    try:
        return _train(config, here, mesh, corpus)
    except Unstable:
        return DIVERGED
    finally:
        close_mesh()


def _train(config: Config, here: Config, mesh: Mesh, corpus: Corpus) -> int:
    """From the first look at the world to its last step. here: ``config`` as it fits the world. Raises Unstable."""
    text, start = resolved_yaml(config), origin(mesh.world_size)
    findings = examine(here, mesh, corpus, start) if config.health.preflight else ()
    refuse(findings)
    folder = open_run_folder(config, text, mesh.rank, lambda t: broadcast_text(t, mesh.world_group), start)
    watchdog = Watchdog(folder.path, mesh, config.machine.timeout_s)
    with rank_log(folder, mesh.rank), Leave(mesh.rank, folder.path) as leave, watchdog:
        trainer = Trainer(here, mesh, corpus, folder, leave, watchdog)
        if mesh.is_main:
            _tell_refit(config, folder, trainer)
            _tell_warnings(warnings(findings), trainer)
        finite = trainer.fit()
        if trainer.left is not None:
            leave.end(trainer.left, folder.requeue)
        barrier(mesh.world_group)
    return 0 if finite or trainer.left is not None else DIVERGED


def _tell_refit(config: Config, folder: RunFolder, trainer: Trainer) -> None:
    """On rank 0: what run.elastic changes, against the start before, or at the first start against what was typed."""
    record = read_record(folder.record)
    assert record is not None, "this start has written it"
    before = [start["world_size"] for start in record["starts"][:-1]]
    text = refit(config, trainer.mesh.world_size, before[-1] if before else None)
    if text:
        print(f"moetrain: {text}", file=sys.stderr, flush=True)
        assert trainer.recorder is not None
        trainer.recorder.event(trainer.start, "elastic", text, {})


def _tell_warnings(messages: list[str], trainer: Trainer) -> None:
    """On rank 0: what preflight found that is no reason not to start."""
    for message in messages:
        print(f"moetrain: {message}", file=sys.stderr, flush=True)
        if trainer.recorder is not None:
            trainer.recorder.event(trainer.start, "preflight", message, {})
