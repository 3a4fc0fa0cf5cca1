"""Which checkpoints stay when a new one is there."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from moetrain.checkpoint import manifest as manifests
from moetrain.checkpoint.find import ASIDE, candidates, step_of

log = logging.getLogger(__name__)
VALIDATION = "validation_loss"


@dataclass(frozen=True)
class Keep:
    """newest: how many. every: also those whose step is a multiple (0: no others). best: also the one with the lowest
    ``extra[VALIDATION]``.
    """

    newest: int
    every: int = 0
    best: bool = False


def prune(folder: Path, new: Path, keep: Keep) -> None:
    """Remove what need not stay now that ``new`` is whole, which always stays.

    What is later than ``new`` is left alone and does not count: a run that went on from before it, because it was
    damaged, must not take it for its newest. What can not be removed is named in the log.
    """
    found = [path for path in candidates(folder) if step_of(path) <= step_of(new)]
    regular = [path for path in found if path.suffix != ASIDE]
    stay = {new, *regular[: keep.newest]}
    if keep.every:
        stay |= {path for path in regular if step_of(path) % keep.every == 0}
    if keep.best:
        losses = {path: loss for path in regular if (loss := _loss(path)) is not None}
        stay |= set(sorted(losses, key=lambda path: losses[path])[:1])
    for path in found:
        if path not in stay:
            remove(path)


def remove_later(folder: Path, step: int) -> None:
    """Remove what a run has saved after ``step`` before it went back there. What can not be removed is named in the
    log.
    """
    for path in candidates(folder):
        if step_of(path) > step:
            remove(path)


def remove_unfinished(folder: Path) -> None:
    """What a save that did not end has left. What can not be removed is named in the log."""
    for leftover in folder.glob("step_*.tmp"):
        remove(leftover)


def remove(path: Path) -> None:
    """Out of sight first: what is half removed is no checkpoint."""
    hidden = path if path.suffix == ".tmp" else path.with_name(path.name + ".gone.tmp")
    try:
        path.rename(hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        log.warning("%s could not be removed: %s", path, error)


def _loss(path: Path) -> float | None:
    try:
        loss = manifests.read(path).extra.get(VALIDATION)
    except (ValueError, OSError):
        return None
    return loss if isinstance(loss, float) else None
