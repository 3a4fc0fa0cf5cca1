"""What a check finds, and how ranks ask each other: every rank looks for itself, then all judge what all have seen.

A check is a probe without collectives, whose outcome is gathered even if it raised, and a judge, a pure function of all
outcomes: no rank waits for one whose probe has failed, and all come to the same verdict.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from moetrain.parallel.collectives import gather_texts
from moetrain.parallel.mesh import Mesh
from moetrain.types import Problem

T = TypeVar("T")
NUM_NAMED = 8
INSTEAD = "mend what it says, or start without these checks: health.preflight=false"


@dataclass(frozen=True)
class Finding:
    """detail: what was seen, or why it can't be. fatal: a run must not start unless it is ok; else it is only told."""

    check: str
    ok: bool
    detail: str
    fix: str = ""
    value: object = None
    fatal: bool = True

    def problem(self) -> Problem:
        return Problem(f"preflight.{self.check}", self.value, self.detail, self.fix)


class Raised(Exception):
    """The probe failed on some ranks."""


def ask(probe: Callable[[], T], kind: Callable[..., T], mesh: Mesh) -> list[T]:
    """What ``probe`` gives on each rank: a flat dataclass ``kind`` of plain values. Collective.

    Raises Raised, on every rank alike, if it raised on any.
    """
    row: dict[str, Any]
    try:
        row = {"facts": asdict(probe())}  # type: ignore[call-overload]
    except Exception as error:  # whatever it is, the other ranks wait for an answer
        row = {"error": f"{type(error).__name__}: {error}"}
    rows = [json.loads(text) for text in gather_texts(json.dumps(row), mesh.world_group)]
    errors = {rank: one["error"] for rank, one in enumerate(rows) if "error" in one}
    if errors:
        raise Raised(by_value([errors.get(rank, "") for rank in range(len(rows))]))
    return [kind(**one["facts"]) for one in rows]


def judged(
    name: str, probe: Callable[[], T], kind: Callable[..., T], judge: Callable[[Sequence[T]], Finding], mesh: Mesh
) -> Finding:
    """The whole of a check. Collective."""
    try:
        return judge(ask(probe, kind, mesh))
    except Raised as error:
        return Finding(name, False, f"the check itself failed: {error}", INSTEAD)


def ranks(numbers: Iterable[int]) -> str:
    """``rank 3``, ``ranks 0, 1``, at most NUM_NAMED of them by number."""
    listed = list(numbers)
    named = ", ".join(map(str, listed[:NUM_NAMED]))
    more = f" and {len(listed) - NUM_NAMED} more" if len(listed) > NUM_NAMED else ""
    return f"{'rank' if len(listed) == 1 else 'ranks'} {named}{more}"


def by_value(values: Sequence[str]) -> str:
    """Which ranks have which value; nothing is said of those without any."""
    groups: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        if value:
            groups.setdefault(value, []).append(rank)
    return "; ".join(f"{value} on {ranks(of)}" for value, of in groups.items())
