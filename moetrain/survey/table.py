"""The catalogue on a terminal, in a pipe and as JSON."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import textwrap
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
TEXT_WIDTH = 100  # of what stands below the table
ALWAYS = 6  # the first columns are shown on any terminal, the others where they fit
COLUMNS = {
    "router": "",
    "k": "experts per token; ~: what is expected, it differs from token to token",
    "causal": "the choice is untouched by later tokens (eval: in evaluation, in training it is not); under a capacity"
    " limit a later token can take the slot of an earlier one all the same, unless capacity.priority=token_major",
    "noise": "in training only",
    "balance": "what evens the load, a loss being the option of conf/balance that comes nearest to what it was"
    " published with (default: moetrain's own, where its coefficients are not known)",
    "error": "the largest absolute difference between its output and that of the blocks of transformers, given the"
    " same weights; `-`: no block was measured, the router's tests hold it to its formulas",
    "needs": "token ids: it reads them; one rank: experts can't be sharded over ranks; `-`: neither, expert"
    " parallelism works",
    "capacity": "the option of conf/capacity that comes nearest to what it was published with (dropless: no limit;"
    " seed: 1.25 times the fair share), `?` where that is not known; even: in training every expert gets equally many"
    " tokens of a micro-batch, so that a limit of the fair share or more drops none, unless the experts do not divide"
    " them or capacity.scope=sequence",
    "paper": "authors and year",
    "equal to": "the block that was measured, +N: and N others, some of them with settings of their own, all in --json",
}


def as_json(rows: Sequence[RouterRow], record: Record) -> str:
    """One object per router, all that is known of it, and what it was measured with."""
    references = by_router(record.cases)
    listed = [_plain(row, references.get(row.name)) for row in rows]
    return json.dumps({"torch": record.torch, "transformers": record.transformers, "routers": listed}, indent=2)


def print_table(rows: Sequence[RouterRow], record: Record, stream: TextIO | None = None) -> None:
    """On a terminal as many columns as fit beside each other; in a pipe all of them, without colours."""
    references = by_router(record.cases)
    file = sys.stdout if stream is None else stream
    live = file.isatty()
    console = Console(file=file) if live else Console(file=file, width=PIPE_WIDTH, color_system=None)
    cells = [_cells(row, references.get(row.name), short=live) for row in rows]
    shown = _fitting(cells, console.width)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for name in shown:
        table.add_column(name, overflow="fold")
    for row in cells:
        table.add_row(*(Text(row[name]) for name in shown))
    with console.capture() as capture:
        console.print(table)
    file.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))
    width = min(console.width, TEXT_WIDTH)
    for line in ("", *_below(rows, record, shown)):
        file.write(textwrap.fill(line, width, subsequent_indent="  ", break_on_hyphens=False) + "\n")


def causality(traits: RouterTraits) -> str:
    """When a token's choice is untouched by later tokens."""
    if traits.causal_train == traits.causal_eval:
        return "yes" if traits.causal_train else "no"
    return "eval" if traits.causal_eval else "training"


def twins(rows: Sequence[RouterRow]) -> list[str]:
    """Options of one class with the same settings: ``a = b = c``."""
    return list(dict.fromkeys(" = ".join(sorted((row.name, *row.same_as))) for row in rows if row.same_as))


def _fitting(cells: Sequence[dict[str, str]], width: int) -> list[str]:
    """The columns that fit, in their order."""
    shown: list[str] = []
    used = 0
    for name in COLUMNS:
        used += 1 + max(len(name), *(len(row[name]) for row in cells))
        if len(shown) < ALWAYS or used <= width:
            shown.append(name)
    return shown


def _below(rows: Sequence[RouterRow], record: Record, shown: Sequence[str]) -> list[str]:
    """The legend of the columns that are shown, and what no column says."""
    missing = [name for name in COLUMNS if name not in shown]
    lines = [f"{len(rows)} routers. Measured with transformers {record.transformers}, torch {record.torch}."]
    lines += [f"{name}: {words}." for name, words in COLUMNS.items() if name in shown and words]
    if same := twins(rows):
        lines.append(f"One class with the same settings, published with another size or balance: {'; '.join(same)}.")
    if missing:
        lines.append(f"Too narrow for {', '.join(missing)}: a wider terminal, `moetrain routers | less -S` or --json.")
    return lines + [f"{row.name}: {fault}" for row in rows for fault in row.faults]


def _cells(row: RouterRow, reference: Reference | None, *, short: bool) -> dict[str, str]:
    """One router by column. short: without the number of the preprint, and one of the blocks for all."""
    paper = "?" if row.about is None else _short(row.about.paper, number=not short)
    error = blocks = NOTHING
    if reference is not None:
        error = f"{reference.output_error:.1e}"
        first, others = reference.blocks[0], len(reference.blocks) - 1
        blocks = (first + (f" +{others}" if others else "")) if short else ",".join(reference.blocks)
    cells = {**_declared(row), "balance": _balance(row), "error": error, "paper": paper, "equal to": blocks}
    return {"router": row.name, **cells}


def _declared(row: RouterRow) -> dict[str, str]:
    """What the class says of itself; ``?`` where it can't be asked."""
    if row.traits is None:
        return dict.fromkeys(("k", "causal", "noise", "needs", "capacity"), "?")
    traits = row.traits
    needs = [*(["token ids"] if traits.needs_tokens else []), *([] if traits.expert_parallel else ["one rank"])]
    capacity = (None if row.about is None else row.about.capacity) or "?"
    return {
        "k": f"{'~' if traits.ragged else ''}{traits.experts_per_token:.3g}",
        "causal": causality(traits),
        "noise": NOTHING if traits.noise == "none" else traits.noise,
        "needs": ", ".join(needs) or NOTHING,
        "capacity": capacity + (", even" if traits.even else ""),
    }


def _short(paper: str, *, number: bool) -> str:
    """What stands before the title: authors and year; and the number of the preprint."""
    authors = re.match(r".*?\b(?:19|20)\d\d\b", paper)
    arxiv = re.search(r"\d{4}\.\d{4,5}", paper) if number else None
    return (paper if authors is None else authors.group()) + ("" if arxiv is None else f" {arxiv.group()}")


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
        "capacity": None if row.about is None else row.about.capacity,
        "traits": None if row.traits is None else dataclasses.asdict(row.traits),
        "same_as": list(row.same_as),
        "faults": list(row.faults),
        "reference": None if reference is None else dataclasses.asdict(reference),
    }
