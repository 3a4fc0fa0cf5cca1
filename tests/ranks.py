"""Several ranks on this machine: fresh processes, gloo, one result a rank.

They are forked from a server that has imported what all need and run nothing: an import of torch costs seconds a rank.
"""

from __future__ import annotations

import gc
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOAD = [
    "moetrain.engine.deepspeed",
    "moetrain.train",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # whose import compiles: seconds with the first ZeRO engine
    "transformers",
]


def _main(rank: int, world: int, store: str, fn: Callable[..., Any], args: tuple[Any, ...], queue: Any) -> None:
    gc.freeze()  # a collection would walk through all that was imported: DeepSpeed asks for one with each engine
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=200)
        )
        queue.put((rank, fn(rank, world, *args), None))
        dist.barrier()
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_ranks(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 280.0) -> list[Any]:
    """Call ``fn(rank, world, *args)`` on every rank and return the results in rank order; a failing rank fails it.

    Results travel as numpy or plain objects: return ``tensor.numpy()`` or floats, not tensors.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        ranks = [
            context.Process(target=_main, args=(r, world, store, fn, args, queue), daemon=True) for r in range(world)
        ]
        for process in ranks:
            process.start()
        try:
            results: dict[int, Any] = {}
            for _ in ranks:
                rank, value, error = queue.get(timeout=timeout)
                assert error is None, f"rank {rank}:\n{error}"
                results[rank] = value
            for process in ranks:
                process.join(timeout=60)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
    return [results[r] for r in range(world)]
