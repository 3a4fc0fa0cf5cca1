"""Which tokens of a corpus are kept for validation: a function of the documents' content, never of chance or order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moetrain.data.bins import write_starts

CHUNK = 2**22


@dataclass(frozen=True, eq=False)
class Split:
    """starts: int64 [num documents], positions in a stream of num_tokens. in_validation: bool [num documents]."""

    starts: NDArray[np.int64]
    in_validation: NDArray[np.bool_]
    num_tokens: int

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.starts, append=self.num_tokens)

    def num_tokens_on(self, validation: bool) -> int:
        return int(self.lengths[self.in_validation == validation].sum())


def split_documents(starts: NDArray[np.int64], hashes: NDArray[np.uint64], num_tokens: int, fraction: float) -> Split:
    """Keep ``fraction`` of the tokens for validation: whole documents in ascending order of their content's hash.

    Documents longer than the whole share stay in training. Where the rest fill less than half of the share (one
    document, a few books) the end of the stream is cut off instead, through a document, which then counts on both
    sides. Neither side is ever empty. starts, hashes: [num documents].
    """
    share = min(max(round(fraction * num_tokens), 1), num_tokens - 1)
    lengths = np.diff(starts, append=num_tokens)
    fitting = np.flatnonzero(lengths <= share)
    fitting = fitting[np.argsort(hashes[fitting], kind="stable")]
    chosen = fitting[np.cumsum(lengths[fitting]) <= share]
    if 2 * int(lengths[chosen].sum()) >= share:
        in_validation = np.zeros(len(starts), dtype=np.bool_)
        in_validation[chosen] = True
        return Split(starts, in_validation, num_tokens)
    cut = num_tokens - share
    starts = np.union1d(starts, [cut])
    return Split(starts, starts >= cut, num_tokens)


def write_split(folder: Path, tokens: NDArray[np.unsignedinteger], split: Split) -> None:
    """Write both sides' ``.bin`` and ``_starts.npy``, in the order of the stream, a chunk at a time."""
    for validation, side in ((False, "train"), (True, "validation")):
        lengths = split.lengths[split.in_validation == validation]
        write_starts(folder, side, np.cumsum(lengths) - lengths)
        with (folder / f"{side}.bin").open("wb") as file:
            for low in range(0, len(tokens), CHUNK):
                chunk = tokens[low : low + CHUNK]
                file.write(chunk[_side_of(split, low, low + len(chunk)) == validation].tobytes())


def _side_of(split: Split, low: int, high: int) -> NDArray[np.bool_]:
    """Whether each token of the stream's positions [low, high) is for validation."""
    first = np.searchsorted(split.starts, low, side="right") - 1
    last = np.searchsorted(split.starts, high, side="left")
    borders = np.append(split.starts[first:last], high).clip(low, high)
    return np.repeat(split.in_validation[first:last], np.diff(borders))
