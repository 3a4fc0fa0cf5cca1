"""Who waits for whom, from what the ranks have left behind. Nothing here talks to another rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moetrain.health.dump import Dump
from moetrain.health.flight import Collective

ALIKE = ("all_reduce", "broadcast")
"""Collectives whose sizes must be the same on all ranks of a group."""


@dataclass(frozen=True)
class Wait:
    """``waiting`` have begun a collective of the group ``ranks`` that ``missing`` have not come to."""

    collective: Collective
    ranks: list[int]
    waiting: list[int]
    missing: list[int]


@dataclass(frozen=True)
class Difference:
    """The first collective of the group ``ranks`` that its ranks do not agree on: what each has begun."""

    number: int
    ranks: list[int]
    begun: Mapping[str, list[int]]


def waits(dumps: Mapping[int, Dump]) -> list[Wait]:
    """Of every group in which somebody waits; the most waited for first, last what all have come to (``missing`` []):
    then nobody is late, but what was sent did not arrive.
    """
    found = []
    for group, ranks in _groups(dumps).items():
        last = {rank: _last(dumps[rank], group) for rank in ranks if rank in dumps}
        stuck = {rank: one for rank, one in last.items() if one is not None and _is_stuck(dumps[rank], one)}
        if not stuck:
            continue
        newest = max(stuck.values(), key=lambda one: one.number)
        numbers = {rank: 0 if one is None else one.number for rank, one in last.items()}
        missing = [rank for rank in ranks if numbers.get(rank, 0) < newest.number]
        waiting = [rank for rank, one in stuck.items() if one.number == newest.number]
        if missing or waiting == ranks:
            found.append(Wait(newest, ranks, waiting, missing))
    return sorted(found, key=lambda wait: (not wait.missing, -len(wait.waiting)))


def culprits(dumps: Mapping[int, Dump], found: Sequence[Wait]) -> list[int]:
    """Ranks that others wait for and that wait for nobody themselves."""
    missing = {rank for wait in found for rank in wait.missing}
    return sorted(missing - {rank for wait in found for rank in wait.waiting}) or sorted(missing)


def differences(dumps: Mapping[int, Dump]) -> list[Difference]:
    """One a group at most: where a rank has left a collective out, or made one too many."""
    found = []
    for group, ranks in _groups(dumps).items():
        by_number: dict[int, dict[str, list[int]]] = {}
        for rank in ranks:
            for one in dumps[rank].flight.collectives if rank in dumps else []:
                if one.group == group:
                    by_number.setdefault(one.number, {}).setdefault(_compared(one), []).append(rank)
        unequal = [number for number, begun in sorted(by_number.items()) if len(begun) > 1]
        if unequal:
            found.append(Difference(unequal[0], ranks, by_number[unequal[0]]))
    return found


def report(dumps: Mapping[int, Dump], world_size: int) -> str:
    """For the operator: which step, which collective, who has not come, where everybody is."""
    found, unequal = waits(dumps), differences(dumps)
    silent = [rank for rank in range(world_size) if rank not in dumps]
    step = max(dump.step for dump in dumps.values())
    lines = [f"TRAINING HAS STOPPED at step {step}: {_headline(dumps, found, unequal, silent)}", ""]
    for wait in found:
        late = f"not come to it: ranks {wait.missing}" if wait.missing else "all have come to it"
        where = f"{wait.collective}, number {wait.collective.number} of the group {wait.ranks}"
        lines.append(f"ranks {wait.waiting} wait in {where}; {late}")
    for one in unequal:
        told = "; ".join(f"ranks {ranks}: {name}" for name, ranks in one.begun.items())
        lines.append(f"ranks do not make the same collective as number {one.number} of the group {one.ranks}: {told}")
    lines += ["", *(_told(dump) for dump in dumps.values())]
    lines += [f"rank {rank}: silent: dead, stopped or cut off" for rank in silent]
    problems = {dump.flight.problem for dump in dumps.values()} - {""}
    lines += [f"which collectives were begun is not known everywhere: {problem}" for problem in sorted(problems)]
    return "\n".join(lines) + "\n"


def _headline(
    dumps: Mapping[int, Dump], found: Sequence[Wait], unequal: Sequence[Difference], silent: list[int]
) -> str:
    if unequal:
        odd = min(unequal[0].begun.values(), key=len)
        even = len({len(ranks) for ranks in unequal[0].begun.values()}) == 1
        return f"ranks {unequal[0].ranks} do not agree" if even else f"ranks {odd} have left the others' order"
    if found and found[0].missing:
        return f"ranks {culprits(dumps, found)} have not come to {found[0].collective}"
    if found:
        hosts = ", ".join(sorted({dumps[rank].host for rank in found[0].ranks}))
        return (
            f"ranks {found[0].ranks} have all come to {found[0].collective}, which has failed: see the links of {hosts}"
        )
    if silent:
        return f"ranks {silent} are silent"
    thrown = any(dump.thrown for dump in dumps.values())
    return "a collective has failed" if thrown else "no rank waits for another, each hangs by itself"


def _told(dump: Dump) -> str:
    where = f"rank {dump.rank} ({dump.host}, pid {dump.pid}): step {dump.step}, {dump.phase}"
    where += f", no sign of life for {dump.silence_s:.0f} s, in {dump.place}"
    return f"{where}\n    {dump.error}" if dump.error else where


def _groups(dumps: Mapping[int, Dump]) -> dict[str, list[int]]:
    return {group: ranks for dump in dumps.values() for group, ranks in dump.flight.ranks.items()}


def _last(dump: Dump, group: str) -> Collective | None:
    """The newest of the group that this rank has begun."""
    return next((one for one in reversed(dump.flight.collectives) if one.group == group), None)


def _is_stuck(dump: Dump, one: Collective) -> bool:
    """In it now, or thrown out of it."""
    return not one.ended or (dump.thrown and one is dump.flight.collectives[-1])


def _compared(one: Collective) -> str:
    return str(one) if one.name.endswith(ALIKE) else one.name
