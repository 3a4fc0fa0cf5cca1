"""Whether what the plan says of memory fits into what is free: of each accelerator, or of each host."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moetrain.parallel.mesh import Mesh
from moetrain.preflight.findings import Finding, judged, ranks

GIB = 2**30
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Memory:
    """Free for this rank, or for all ranks of ``pool`` together. free_bytes None: this system does not say."""

    pool: str
    free_bytes: int | None


def check_memory(needed: int, mesh: Mesh) -> Finding:
    """needed: bytes of each rank, without activations. Collective."""
    return judged("memory", lambda: free(mesh), Memory, lambda memories: judge_memory(memories, needed), mesh)


def judge_memory(memories: Sequence[Memory], needed: int) -> Finding:
    pools: dict[str, list[int]] = {}
    for rank, one in enumerate(memories):
        pools.setdefault(one.pool, []).append(rank)
    least: tuple[float, str] | None = None
    for pool, of in pools.items():
        known = [memory.free_bytes for memory in (memories[rank] for rank in of) if memory.free_bytes is not None]
        if not known:
            continue
        said = f"{ranks(of)} on {pool}: {len(of) * needed / GIB:.2f} of {min(known) / GIB:.2f} GiB that are free"
        least = min(filter(None, (least, (min(known) - len(of) * needed, said))))
    said = f"{needed / GIB:.2f} GiB a rank before activations"
    if least is None:
        return Finding("memory", True, f"{said}; what is free is not known here")
    if least[0] < 0:
        fix = "raise engine.zero_stage or engine.ep_size, use more ranks, or choose a smaller model"
        return Finding("memory", False, f"weights, gradients and optimiser state do not fit: {least[1]}", fix, said)
    return Finding("memory", True, f"{said}; {least[1]}")


def free(mesh: Mesh) -> Memory:
    """Of this rank's accelerator, or of the host."""
    if mesh.device.type != "cpu":
        bytes_free, _ = torch.accelerator.get_memory_info(mesh.device)
        return Memory(f"{socket.gethostname()} {mesh.device}", bytes_free)
    return Memory(socket.gethostname(), host_free(MEMINFO, CGROUP))


def host_free(meminfo: Path, cgroup: Path) -> int | None:
    """MemAvailable, or less where a control group (version 2) sets a limit; its page cache counts as free."""
    if not meminfo.is_file():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    limit = cgroup / "memory.max"
    if not limit.is_file() or limit.read_text().strip() == "max":
        return available
    stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    used = int((cgroup / "memory.current").read_text()) - int(stat["inactive_file"])
    return min(available, int(limit.read_text()) - used)
