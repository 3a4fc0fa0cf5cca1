"""Which domain each document comes from, by names that the data has: the largest are told apart, the rest is "other".

A domain is a number in [0, D), one byte a document beside the bins, and its name stands in their metadata.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrain.data.errors import refusal

FIELD = "data.domain_field"
MAX_DOMAINS = 32
MAX_NAMES = 2**16
OTHER = "other"
BY_PATH = ("folder", "file")


@dataclass(frozen=True, eq=False)
class Domains:
    """names: at most MAX_DOMAINS of those with the most tokens, largest first, then "other" if anything is left.

    of_document: uint8 [num documents], positions in ``names``.
    """

    names: tuple[str, ...]
    of_document: NDArray[np.uint8]


class DomainNames:
    """Names as they come; of the documents that come after MAX_NAMES different ones, new names count as "other"."""

    def __init__(self) -> None:
        self._numbers = {OTHER: 0}
        self._of_document = array("H")

    def add(self, name: str | None) -> None:
        """The domain of the next document; None: it names none, which is "other"."""
        name = OTHER if name is None else name
        if name not in self._numbers and len(self._numbers) < MAX_NAMES:
            self._numbers[name] = len(self._numbers)
        self._of_document.append(self._numbers.get(name, 0))

    def told_apart(self, lengths: NDArray[np.int64]) -> Domains:
        """lengths: tokens of each document. Documents of the same length are ranked by name, so by content only."""
        numbers = np.array(self._of_document, dtype=np.int64)
        sizes = np.bincount(numbers, weights=lengths, minlength=len(self._numbers))
        named = [(-sizes[number], name, number) for name, number in self._numbers.items() if number and sizes[number]]
        best = sorted(named)[:MAX_DOMAINS]
        place = np.full(len(self._numbers), len(best), dtype=np.uint8)
        for at, (_, _, number) in enumerate(best):
            place[number] = at
        of_document = place[numbers]
        names = tuple(name for _, name, _ in best)
        return Domains((*names, OTHER) if (of_document == len(best)).any() else names, of_document)


def domain_of(row: Mapping[str, Any], field: str, where: str) -> str | None:
    """What a record has in the column ``field``: a name, or a number or truth value as one; None for null or "".

    Raises ConfigError for a record without that column, and for one with anything else in it.
    """
    if field not in row:
        raise missing(field, where, row)
    name = row[field]
    if name is None or name == "":
        return None
    if not isinstance(name, str | int):
        reason = f"{where} holds {name!r:.40} there, no name"
        raise refusal(FIELD, field, reason, "choose a column of names, or leave it null")
    return str(name)


def missing(field: str, where: str, names: Mapping[str, Any] | list[str]) -> Exception:
    return refusal(FIELD, field, f"{where} has no such field", f"choose one of {', '.join(names)}, or leave it null")
