"""Which checkpoint a run goes on from: the newest that is what was written, the same for all ranks."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

from moetrain.checkpoint.manifest import MANIFEST
from moetrain.checkpoint.source import Source
from moetrain.parallel.collectives import broadcast_text, gather_texts
from moetrain.parallel.mesh import Mesh

log = logging.getLogger(__name__)
ASIDE = ".old"  # what made way for another of the same step, between two renames
NAME = re.compile(r"step_(\d{8,})(\.old)?")


class NoneWhole(ValueError):
    """There are checkpoints, and not one of them can be used; says what is wrong with each."""


def find(folder: Path, mesh: Mesh, before: int | None = None) -> Source | None:
    """The newest checkpoint in ``folder`` that verifies; those that do not are named in the log. Collective.

    before: only those of earlier steps count. None if there is none at all. Raises NoneWhole, on every rank, if there
    are some and none verifies.
    """
    found = [p.name for p in candidates(folder) if before is None or step_of(p) < before]
    names = broadcast_text("/".join(found), mesh.world_group)
    wrong: list[str] = []
    for name in names.split("/") if names else []:
        source, problem = _verified(folder / name, mesh)
        if source is not None:
            source.passed_over = tuple(wrong)
            return source
        wrong.append(f"{name}: {problem}")
        log.warning("checkpoint %s is not used: %s", name, problem)
    if wrong:
        raise NoneWhole(f"{folder} holds no checkpoint that can be used; " + "; ".join(wrong))
    return None


def candidates(folder: Path) -> list[Path]:
    """Newest first; of one step, the one that made way for another last."""
    found = [path for path in folder.glob("step_*") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (step_of(path), path.suffix != ASIDE), reverse=True)


def step_of(path: Path) -> int:
    """The step in the name of a candidate."""
    return int(path.stem.removeprefix("step_"))


def latest(folder: Path) -> Path | None:
    """The newest in ``folder`` that was finished, as this process sees it. It is not verified."""
    return next((path for path in candidates(folder) if (path / MANIFEST).is_file()), None)


def _verified(path: Path, mesh: Mesh) -> tuple[Source | None, str]:
    """The source, opened; or None, and what is wrong with it. The same on every rank."""
    box: list[Source] = []

    def verify() -> None:
        """Every rank reads every world_size-th file from end to end."""
        source = Source(path)
        if source.step != step_of(path):
            raise ValueError(f"{path / MANIFEST} is of step {source.step}: it belongs elsewhere")
        source.verify(slice(mesh.rank, None, mesh.world_size))
        box.append(source)

    for act in (verify, lambda: box[0].open()):
        if problem := _first_problem(act, mesh):
            return None, problem
    return box[0], ""


def _first_problem(act: Callable[[], None], mesh: Mesh) -> str:
    problem = ""
    try:
        act()
    except (ValueError, OSError) as error:
        problem = str(error)
    return next((text for text in gather_texts(problem, mesh.world_group) if text), "")
