"""Whether all-reduce, all-to-all and messages between neighbours give right answers in each group, and how fast.

Every value says which rank it comes from, so that an answer is right or it is not. All ranks leave a collective
together, whoever was slow; so a slow rank is looked for by messages between two: it is slow with both its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median_low
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.parallel.mesh import Mesh
from moetrain.preflight.findings import Finding, Raised, ask, ranks

MIB = 2**20
NUM_BYTES = MIB
"""Of the buffer of a rank. A collective of it takes long enough to be timed, and a second on the slowest links."""
REPEATS = 3
SLOW_FACTOR = 3.0
SLOW_S = 0.005
"""A rank is slow if its messages take SLOW_FACTOR times the median, and that much longer."""


@dataclass(frozen=True)
class Measured:
    """Of one rank in one group. wrong: the operations whose answer was wrong. Seconds are the best of REPEATS.

    pair_s: of a message to and from a neighbour, the quicker of both; None where there is no choice of neighbours.
    """

    wrong: list[str]
    all_reduce_s: float
    all_to_all_s: float
    pair_s: float | None


def check_groups(mesh: Mesh) -> list[Finding]:
    """A finding for each kind of group, and one for each that has slow ranks. Collective.

    What fails within a collective is raised here: the others wait in it, and only the end of this process tells them.
    """
    kinds = (("world", mesh.world_group), ("EP", mesh.ep_group), ("expert-DP", mesh.expert_dp_group))
    found: list[Finding] = []
    for kind, group in kinds:
        size = 1 if group is None else dist.get_world_size(group)
        if group is None or size == 1:
            found.append(Finding(_check(kind), True, "one rank, nothing to send"))
            continue
        measured = measure(group, mesh.device, NUM_BYTES)
        try:
            rows = ask(lambda measured=measured: measured, Measured, mesh)  # type: ignore[misc]
        except Raised as error:
            raise AssertionError("measured values are plain") from error
        found += judge_group(kind, rows, NUM_BYTES, size)
    return found


def judge_group(kind: str, rows: Sequence[Measured], num_bytes: int, size: int) -> list[Finding]:
    """rows: of all ranks of the world, each in its own group of this kind."""
    wrong = {rank: one.wrong for rank, one in enumerate(rows) if one.wrong}
    if wrong:
        what = sorted({name for names in wrong.values() for name in names})
        reason = f"{' and '.join(what)} gave wrong values on {ranks(wrong)}"
        fix = f"look at memory, network cards and drivers of the hosts of {ranks(wrong)}, or leave them out"
        return [Finding(_check(kind), False, reason, fix, ranks(wrong))]
    rates = [num_bytes / MIB / max(getattr(one, f"{name}_s") for one in rows) for name in ("all_reduce", "all_to_all")]
    said = f"{size} ranks: all-reduce {rates[0]:,.0f} MiB/s, all-to-all {rates[1]:,.0f} MiB/s"
    return [Finding(_check(kind), True, said), *_slow(kind, rows)]


def _check(kind: str) -> str:
    return f"{kind} group"


def _slow(kind: str, rows: Sequence[Measured]) -> list[Finding]:
    times = {rank: one.pair_s for rank, one in enumerate(rows) if one.pair_s is not None}
    if not times:
        return []
    usual = median_low(times.values())
    slow = {rank: s for rank, s in times.items() if s > SLOW_FACTOR * usual and s > usual + SLOW_S}
    if not slow:
        return []
    said = ", ".join(f"rank {rank} {seconds / usual:.1f}x" for rank, seconds in list(slow.items())[:8])
    reason = f"messages with {ranks(slow)} take longer than the median of {usual * 1e3:.1f} ms: {said}"
    fix = "look at the hosts' load and links, or leave them out: every step waits for them"
    return [Finding(f"{kind} speed", False, reason, fix, ranks(slow), fatal=False)]


def measure(group: ProcessGroup, device: torch.device, num_bytes: int) -> Measured:
    """Collective over the group."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    chunk = max(num_bytes // 8 // size, 1)
    wrong: list[str] = []
    seconds: dict[str, float] = {}
    operations = {"all-reduce": _all_reduce, "all-to-all": _all_to_all}
    for name, operation in operations.items():
        taken = []
        for _ in range(REPEATS + 1):  # the first one connects
            dist.barrier(group)
            began = perf_counter()
            right = operation(rank, size, chunk, device, group)
            _synchronise(device)
            taken.append(perf_counter() - began)
            if not right() and name not in wrong:
                wrong.append(name)
        seconds[name] = min(taken[1:])
    pair_s, pairs_right = _pairs(rank, size, chunk, device, group)
    wrong += [] if pairs_right else ["messages to neighbours"]
    return Measured(wrong, seconds["all-reduce"], seconds["all-to-all"], pair_s)


def _all_reduce(rank: int, size: int, chunk: int, device: torch.device, group: ProcessGroup) -> Callable[[], bool]:
    place_X = torch.arange(size * chunk, device=device) % 251
    sent_X = place_X * (rank + 1)
    dist.all_reduce(sent_X, group=group)
    return lambda: bool((sent_X == place_X * (size * (size + 1) // 2)).all())


def _all_to_all(rank: int, size: int, chunk: int, device: torch.device, group: ProcessGroup) -> Callable[[], bool]:
    """Rank r sends ``r * size + s`` to rank s."""
    others = torch.arange(size, device=device)
    sent_X = (rank * size + others).repeat_interleave(chunk)
    got_X = torch.full_like(sent_X, -1)
    dist.all_to_all_single(got_X, sent_X, group=group)
    return lambda: bool((got_X == (others * size + rank).repeat_interleave(chunk)).all())


def _pairs(rank: int, size: int, chunk: int, device: torch.device, group: ProcessGroup) -> tuple[float | None, bool]:
    """Seconds with the quicker of two neighbours on a ring, None where they are the same; and whether all is right."""
    best: list[float] = []
    right = True
    for phase in range(2 + size % 2):
        partner, taken = partner_of(rank, size, phase), []
        for _ in range(REPEATS + 1):
            dist.barrier(group)
            if partner is not None:
                began = perf_counter()
                got_X = swap(rank, partner, size * chunk, device, group)
                _synchronise(device)
                taken.append(perf_counter() - began)
                right &= bool((got_X == partner).all())
        best += [min(taken[1:])] if taken else []
    return (min(best) if size > 2 else None), right


def partner_of(rank: int, size: int, phase: int) -> int | None:
    """Who talks with whom, so that two or, on an odd ring, three phases join all neighbours; None: nobody."""
    if phase == 2:
        return {0: size - 1, size - 1: 0}.get(rank)
    partner = rank + 1 if (rank + phase) % 2 == 0 else rank - 1
    if size % 2 == 0:
        return partner % size
    return partner if 0 <= partner < size else None


def swap(rank: int, partner: int, num: int, device: torch.device, group: ProcessGroup) -> Tensor:
    """Send my number ``num`` times, get the partner's."""
    sent_X = torch.full((num,), rank, device=device)
    got_X = torch.full_like(sent_X, -1)
    peer = dist.get_global_rank(group, partner)
    messages = [dist.P2POp(dist.isend, sent_X, peer, group), dist.P2POp(dist.irecv, got_X, peer, group)]
    for work in dist.batch_isend_irecv(messages):
        work.wait()
    return got_X


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
