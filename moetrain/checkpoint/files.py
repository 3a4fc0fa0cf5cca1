"""One rank's file: safetensors, written as a stream and hashed on the way, so that nothing is held twice in memory.

A tensor in it is a piece of a canonical one and is called ``key@start``; it is flat.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from moetrain.canonical import DTYPES, Piece

ALIGNMENT = 8
BLOCK = 1 << 24


@dataclass(frozen=True)
class Written:
    """What a file must be to be the one that was written. xxh3: 128 bits in hex; against accidents, not enemies."""

    bytes: int
    xxh3: str


class Contents:
    """The pieces of one file in the order in which they lie there: widest dtype first, so that all are aligned."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = sorted(pieces, key=lambda piece: -piece.values_X.element_size())
        self.num_bytes = sum(piece.values_X.nbytes for piece in self.pieces)

    def header(self) -> bytes:
        """What the file begins with. It takes longer than copying small tensors, and can be made at any time after."""
        entries, end = {}, 0
        for piece in self.pieces:
            begin, end = end, end + piece.values_X.nbytes
            entry = {"dtype": DTYPES[piece.values_X.dtype], "shape": [piece.values_X.numel()]}
            entries[f"{piece.key}@{piece.start}"] = entry | {"data_offsets": [begin, end]}
        assert len(entries) == len(self.pieces), "two pieces begin at the same element"
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    def live(self) -> Iterator[memoryview]:
        """The bytes after the header, straight from where the tensors are."""
        for piece in self.pieces:
            yield from _blocks(piece.values_X.detach().cpu().contiguous().view(torch.uint8))

    def copied(self, buffer: Tensor) -> Iterator[memoryview]:
        """The same from ``buffer`` (uint8, on the host), into which they are copied now; it must not change until the
        last block is taken.
        """
        end = 0
        for piece in self.pieces:
            begin, end = end, end + piece.values_X.nbytes
            buffer[begin:end].view(piece.values_X.dtype).copy_(piece.values_X.detach(), non_blocking=True)
        if any(piece.values_X.device.type != "cpu" for piece in self.pieces):
            torch.accelerator.synchronize()
        return _blocks(buffer[:end])


def write(file: Path, header: bytes, blocks: Iterable[memoryview]) -> Written:
    """Write and have it on disk. Raises OSError."""
    content, size = xxhash.xxh3_128(), 0
    with file.open("wb", buffering=1 << 20) as stream:
        for block in chain([memoryview(header)], blocks):
            stream.write(block)
            content.update(block)
            size += len(block)
        stream.flush()
        os.fsync(stream.fileno())
    return Written(size, content.hexdigest())


def read_back(file: Path) -> Written:
    """What lies there now. Raises OSError."""
    content, size = xxhash.xxh3_128(), 0
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            content.update(block)
            size += len(block)
    return Written(size, content.hexdigest())


def sync_folder(folder: Path) -> None:
    """Have the names in it on disk before going on."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _blocks(bytes_X: Tensor) -> Iterator[memoryview]:
    """Never empty ones. In pieces, so that hashing and writing take turns with other threads."""
    whole = memoryview(bytes_X.numpy())
    for begin in range(0, len(whole), BLOCK):
        yield whole[begin : begin + BLOCK]
