"""expert_load.jsonl: which expert got how many tokens, as exact counts, at a bounded rate.

Counts are of a window of optimiser steps, over all ranks and micro-batches, training only; int64 throughout. See
moetrain.monitor.lines for how the file survives being killed and resumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrain.monitor.domains import DomainCounts
from moetrain.monitor.lines import Keys, Line, LineReader, LineWriter
from moetrain.monitor.pace import is_spread_step

KEYS = Keys("step", "segment")
NUM_RECORDS = 500
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class SplitCounts:
    """Assignments of each layer split by X, [L, X]: choice rank, or equal parts of the sequence. Before, after
    dropping.
    """

    assigned_LX: Counts
    kept_LX: Counts


@dataclass(frozen=True)
class LoadWindow:
    """The counts of the ``num_steps`` optimiser steps that end with ``step``, at ``tokens`` tokens since the start.

    layers: the decoder layer of each row. Experts [r * E / ep_size, (r + 1) * E / ep_size) live on EP rank r.
    assigned_LE: before dropping. kept_LE: after it. received_LW: rows that each rank of the world received for its
    experts. choice: X is the choice rank, first choice first. position: X is the part of the sequence, in order.
    domains: of the domains that the corpus names. None: not counted, or not recorded.
    """

    step: int
    tokens: int
    num_steps: int
    layers: tuple[int, ...]
    ep_size: int
    assigned_LE: Counts
    kept_LE: Counts
    received_LW: Counts | None = None
    choice: SplitCounts | None = None
    position: SplitCounts | None = None
    domains: DomainCounts | None = None


def is_load_step(step: int, steps: int, log_every: int) -> bool:
    """Whether the window that ends with this step is recorded: at most NUM_RECORDS a run, and the last one."""
    return step == steps or is_spread_step(step, steps, log_every, NUM_RECORDS)


class ExpertLoadFile:
    """The writer, for one rank only. When to write: see ``is_load_step``."""

    def __init__(self, path: Path, step: int, tokens: int) -> None:
        """Open a new segment which continues after ``step`` (0 for a new run). A torn last line is cut off."""
        self.lines = LineWriter(path, KEYS, step, {"tokens": tokens})

    def write(self, window: LoadWindow) -> None:
        row: dict[str, object] = {
            "tokens": window.tokens,
            "num_steps": window.num_steps,
            "layers": list(window.layers),
            "ep_size": window.ep_size,
            "assigned": window.assigned_LE.tolist(),
            "kept": window.kept_LE.tolist(),
        }
        if window.received_LW is not None:
            row["received"] = window.received_LW.tolist()
        for name, split in (("choice", window.choice), ("position", window.position)):
            if split is not None:
                row[name] = {"assigned": split.assigned_LX.tolist(), "kept": split.kept_LX.tolist()}
        if window.domains is not None:
            names, assigned_LDE = window.domains.names, window.domains.assigned_LDE
            row["domains"] = {"names": list(names), "assigned": assigned_LDE.tolist()}
        self.lines.write(window.step, row)

    def close(self) -> None:
        self.lines.close()


class ExpertLoadReader:
    """The reader, of a run that may still be going on."""

    def __init__(self, path: Path) -> None:
        self._lines = LineReader(path, KEYS)
        self._by_step: dict[int, LoadWindow] = {}

    def poll(self) -> bool:
        """Read what is new. Returns whether there was anything. Raises ValueError, naming file and line."""
        lines = self._lines.poll()
        for line in lines:
            if line.opens:
                self._by_step = {step: kept for step, kept in self._by_step.items() if step <= line.step}
            else:
                self._by_step[line.step] = self._window(line)
        return bool(lines)

    def windows(self) -> tuple[LoadWindow, ...]:
        """In order of steps, without those that a later segment went back over."""
        return tuple(self._by_step[step] for step in sorted(self._by_step))

    def _window(self, line: Line) -> LoadWindow:
        try:
            return _parse(line.row)
        except KeyError as error:
            raise self._lines.error(line.number, f"{error.args[0]} is missing") from None
        except (TypeError, ValueError, OverflowError) as error:
            raise self._lines.error(line.number, str(error)) from None


def _parse(row: dict[str, Any]) -> LoadWindow:
    layers = tuple(int(layer) for layer in row["layers"])
    num_layers, ep_size = len(layers), int(row["ep_size"])
    assigned_LE = _counts("assigned", row["assigned"], num_layers)
    if ep_size < 1 or assigned_LE.shape[1] % ep_size:
        raise ValueError(f"{assigned_LE.shape[1]} experts on {ep_size} expert-parallel ranks")
    return LoadWindow(
        step=row[KEYS.step],
        tokens=int(row["tokens"]),
        num_steps=int(row["num_steps"]),
        layers=layers,
        ep_size=ep_size,
        assigned_LE=assigned_LE,
        kept_LE=_same("kept", row["kept"], assigned_LE),
        received_LW=_counts("received", row["received"], num_layers) if "received" in row else None,
        choice=_split("choice", row, num_layers),
        position=_split("position", row, num_layers),
        domains=_domains(row, assigned_LE) if "domains" in row else None,
    )


def _domains(row: dict[str, Any], assigned_LE: Counts) -> DomainCounts:
    """Whose counts add up to those of all tokens."""
    names = tuple(str(name) for name in row["domains"]["names"])
    table = np.array(row["domains"]["assigned"])
    num_layers, num_experts = assigned_LE.shape
    if table.shape != (num_layers, len(names), num_experts) or table.dtype.kind != "i" or (table < 0).any():
        raise ValueError(f"domains.assigned is no table of {num_layers} x {len(names)} x {num_experts} counts")
    if (table.sum(axis=1) != assigned_LE).any():
        raise ValueError("domains.assigned does not add up to assigned")
    return DomainCounts(names, table.astype(np.int64))


def _split(name: str, row: dict[str, Any], num_layers: int) -> SplitCounts | None:
    if name not in row:
        return None
    assigned_LX = _counts(f"{name}.assigned", row[name]["assigned"], num_layers)
    return SplitCounts(assigned_LX, _same(f"{name}.kept", row[name]["kept"], assigned_LX))


def _counts(name: str, value: Any, num_layers: int) -> Counts:
    """A table of whole numbers with a row a layer."""
    table = np.array(value)
    if table.ndim != 2 or len(table) != num_layers or table.dtype.kind != "i" or (table < 0).any():
        raise ValueError(f"{name} is no table of {num_layers} rows of counts")
    return table.astype(np.int64)


def _same(name: str, value: Any, like: Counts) -> Counts:
    table = _counts(name, value, len(like))
    if table.shape != like.shape:
        raise ValueError(f"{name} has {table.shape[1]} columns, not {like.shape[1]}")
    return table
