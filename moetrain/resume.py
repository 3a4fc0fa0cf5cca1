"""What a run goes on from: the newest checkpoint of its folder that verifies."""

from __future__ import annotations

import logging

from moetrain import checkpoint
from moetrain.checkpoint import Keep, NoneWhole, SavedBy, Saver, Source
from moetrain.config import Config
from moetrain.engine import Engine
from moetrain.monitor.runfolder import RunFolder
from moetrain.ops.kernels import Kernels, fastest_gemm, make_kernels
from moetrain.parallel.collectives import broadcast_text
from moetrain.parallel.mesh import Mesh
from moetrain.types import ConfigError, Problem

log = logging.getLogger(__name__)
AS_SAVED = "start it with the model and the optimiser it was saved with, or name another run.id"


def find_source(config: Config, folder: RunFolder, mesh: Mesh, corpus: str) -> Source | None:
    """The newest checkpoint of the run folder that verifies, if the run is to go on from it. corpus: its fingerprint.

    Raises ConfigError where ``run.resume`` forbids what was found. Collective.
    """
    resume, saved = config.run.resume, folder.checkpoints
    try:
        found = None if resume == "never" else checkpoint.find(saved, mesh)
    except NoneWhole as error:
        fix = f"name another run.id, or delete {saved} if the run is to start anew"
        raise cannot_resume(config, str(error), fix) from error
    if found is None:
        if resume == "must":
            fix = "name another run.id, or set run.resume=auto"
            raise cannot_resume(config, f"{saved} holds no whole checkpoint", fix)
        return None
    if (trained := found.extra["corpus"]) != corpus:
        reason = f"{found.path} was trained on another corpus ({trained[:12]})"
        fix = "give the same data section, tokenizer and files"
        raise ConfigError([Problem("data", corpus[:12], reason, fix)])
    return found


def make_saver(config: Config, mesh: Mesh, folder: RunFolder, engine: Engine) -> Saver:
    """Of the checkpoints to come of what ``engine`` trains."""
    train, layout = config.train, config.engine
    saved_by = SavedBy(mesh.world_size, mesh.ep_size, layout.name, layout.zero_stage, mesh.device.type)
    keep = Keep(train.keep_checkpoints, train.keep_every, train.keep_best)
    saver = Saver(folder.checkpoints, mesh, saved_by, keep, background=train.async_checkpoint)
    saver.reserve(engine.state(), checkpoint.generators(mesh.rank, mesh.device))
    return saver


def restore_generators(found: Source, mesh: Mesh, seed: int) -> str:
    """As saved where the world is the same, else anew from seed and step. Returns what is to be said of it."""
    saved_by = found.manifest.saved_by
    if (saved_by.world_size, saved_by.device) == (mesh.world_size, mesh.device.type):
        checkpoint.set_generators(found.generators(mesh.rank), mesh.device)
        return "random generators go on"
    checkpoint.seed_generators(seed, found.step, mesh.rank)
    return (
        f"saved by {saved_by.world_size} ranks on {saved_by.device}: random generators start anew, from seed and step"
    )


def choose_kernels(config: Config, mesh: Mesh, found: Source | None) -> Kernels:
    """Products by what the run has used so far on this kind of device, else by the fastest of rank 0, on every rank: a
    resumed run and replicas round alike. (Triton's tiles are tuned in each process: there they round alike to a bit or
    two.)
    """
    known = found is not None and found.manifest.saved_by.device == mesh.device.type
    name = found.extra["gemm"] if found is not None and known else fastest_gemm(mesh.device)
    name = broadcast_text(name, mesh.world_group)
    kernels = make_kernels(mesh.device, "onednn" if name == "onednn" else "torch", config.machine.experts_kernel)
    log.info("matrix products by %s, experts by %s", kernels.gemm_name, kernels.experts_name)
    return kernels


def cannot_resume(config: Config, reason: str, fix: str) -> ConfigError:
    return ConfigError([Problem("run.resume", config.run.resume, reason, fix)])
