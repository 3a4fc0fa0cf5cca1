"""Engines: ``deepspeed`` for many ranks, ``local`` in plain torch as its oracle."""

from __future__ import annotations

import os

from torch import nn

from moetrain.config import Config
from moetrain.engine.base import Engine
from moetrain.parallel.mesh import Mesh

__all__ = ["Engine", "make_engine"]


def make_engine(config: Config, model: nn.Module, mesh: Mesh, accumulation: int) -> Engine:
    """The engine that ``config.engine`` names, around ``model`` (fp32, on the mesh's device), which it takes over.

    ``accumulation``: micro-batches per optimiser step. DeepSpeed is imported only where it is chosen: it takes seconds.
    """
    if config.engine.name == "local":
        from moetrain.engine.local import LocalEngine

        return LocalEngine(config, model, mesh, accumulation)
    os.environ["DS_ACCELERATOR"] = mesh.device.type  # read at import, which else takes a GPU where one is
    from moetrain.engine.deepspeed import make_deepspeed

    return make_deepspeed(config, model, mesh, accumulation)
