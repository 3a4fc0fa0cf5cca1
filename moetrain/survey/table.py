"""The catalogue on a terminal, in a pipe and as JSON."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moetrain.parity.record import Record
from moetrain.survey.catalogue import RouterRow
from moetrain.survey.references import Reference, by_router
from moetrain.types import RouterTraits

NOTHING = "-"
PIPE_WIDTH = 10_000  # one line per router, for grep
WIDE = 130  # from this width on a terminal the short columns are not wrapped
NARROW = {"k": 6, "causal": 7, "capacity": 8, "noise": 8}
COLUMNS = ("paper", *NARROW, "balance", "equal to")
LEGEND = """\
k: experts per token, expected where it is ragged. causal: untouched by later tokens. capacity:
whether a limit of at least the fair share can drop assignments in training. noise: in training
only. balance: what evens the load, a loss being the option of conf/balance that the router was
published with. equal to: blocks of transformers that were given the same weights, some of them
with settings of their own, and the largest absolute difference of outputs that was measured, all
in --json; `-`: no block was measured, the router's tests hold it to its formulas."""


def as_json(rows: Sequence[RouterRow], record: Record) -> str:
    """One object per router, all that is known of it, and what it was measured with."""
    references = by_router(record.cases)
    listed = [_plain(row, references.get(row.name)) for row in rows]
    return json.dumps({"torch": record.torch, "transformers": record.transformers, "routers": listed}, indent=2)


def print_table(rows: Sequence[RouterRow], record: Record, stream: TextIO | None = None) -> None:
    """As wide as the terminal, wrapped; in a pipe without colours and one line per router."""
    references = by_router(record.cases)
    file = sys.stdout if stream is None else stream
    live = file.isatty()
    console = Console(file=file) if live else Console(file=file, width=PIPE_WIDTH, color_system=None)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("router", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, overflow="fold", width=NARROW.get(name) if console.width < WIDE else None)
    for row in rows:
        table.add_row(*(Text(cell) for cell in _cells(row, references.get(row.name), short=live)))
    with console.capture() as capture:
        console.print(table)
    file.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))
    faults = [f"{row.name}: {fault}" for row in rows for fault in row.faults]
    measured = f"Measured with transformers {record.transformers}, torch {record.torch}."
    for line in (f"\n{len(rows)} routers. {measured}", LEGEND, *([] if not faults else ["", *faults])):
        console.print(Text(line))


def causality(traits: RouterTraits) -> str:
    """When a token's choice is untouched by later tokens."""
    if traits.causal_train == traits.causal_eval:
        return "yes" if traits.causal_train else "no"
    return "in eval only" if traits.causal_eval else "in training only"


def _cells(row: RouterRow, reference: Reference | None, *, short: bool) -> list[str]:
    """One router, in the order of the columns; short: one of the blocks for all."""
    paper = "?" if row.about is None else _short(row.about.paper)
    traits = ["?"] * 4
    if row.traits is not None:
        ragged = " ragged" if row.traits.ragged else ""
        drops = "never drops" if row.traits.even else "may drop"
        noise = NOTHING if row.traits.noise == "none" else row.traits.noise
        traits = [f"{row.traits.experts_per_token:g}{ragged}", causality(row.traits), drops, noise]
    parity = NOTHING
    if reference is not None:
        blocks, more = (reference.blocks[:1], len(reference.blocks) - 1) if short else (reference.blocks, 0)
        parity = f"{', '.join(blocks)}{f' and {more} more' if more else ''}: {reference.output_error:.1e}"
    return [row.name, paper, *traits, _balance(row), parity]


def _short(paper: str) -> str:
    """Authors and year, and the number of the preprint."""
    number = re.search(r"\d{4}\.\d{4,5}", paper)
    return paper.partition(",")[0] + ("" if number is None else f" {number.group()}")


def _balance(row: RouterRow) -> str:
    """What evens the load; ``?`` where neither the class nor the file says."""
    words = [] if row.traits is None or row.traits.balance == "none" else [row.traits.balance]
    words += [] if row.about is None or row.about.balance == "none" else [f"{row.about.balance} loss"]
    return " + ".join(words) or ("?" if row.about is None or row.traits is None else NOTHING)


def _plain(row: RouterRow, reference: Reference | None) -> dict[str, Any]:
    return {
        "name": row.name,
        "paper": None if row.about is None else row.about.paper,
        "balance": None if row.about is None else row.about.balance,
        "traits": None if row.traits is None else dataclasses.asdict(row.traits),
        "faults": list(row.faults),
        "reference": None if reference is None else dataclasses.asdict(reference),
    }
