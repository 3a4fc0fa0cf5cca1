"""Prepared corpora on disk: flat bins of token ids, where the documents start, and what is known about them.

A folder holds ``train.bin``, ``validation.bin`` (little-endian uint16 or uint32, documents end to end, each closed by
an end-of-document token), ``train_starts.npy``, ``validation_starts.npy`` (int64, the position of each document's first
token), ``meta.json`` and, unless the tokens are bytes, ``tokenizer.json``. It appears whole, by a rename, or never.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from pydantic.dataclasses import dataclass as checked

from moetrain.config import STRICT
from moetrain.data.errors import refusal
from moetrain.data.tokenizer import Tokenizer, read_tokenizer

VERSION = 1
META = "meta.json"
NPY_HEADER = 128  # numpy pads the header of an .npy file to a multiple of 64; that of one axis takes two
ANEW = "delete this folder and prepare the data anew"


@checked(frozen=True, config=STRICT, kw_only=True)
class Meta:
    """meta.json. Entropies: nats per train token (see entropy.py). num_bytes: of all text, in UTF-8.

    fingerprint: SHA-256 of source, tokenizer and settings. num_documents: of the source, those without text left out; a
    document that is cut at the split counts on both sides.
    """

    version: int
    source: str
    fingerprint: str
    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    tokenizer_hash: str
    num_documents: int
    num_bytes: int
    num_train_tokens: int
    num_train_documents: int
    num_validation_tokens: int
    num_validation_documents: int
    unigram_entropy: float
    bigram_entropy: float
    entropy_tokens: int


@dataclasses.dataclass(frozen=True, eq=False)
class TokenStream:
    """One side of a corpus. tokens: [num tokens], memory-mapped. starts: int64 [num documents], ascending, first 0."""

    tokens: NDArray[np.unsignedinteger]
    starts: NDArray[np.int64]


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """A prepared corpus, open for reading."""

    folder: Path
    meta: Meta
    tokenizer: Tokenizer
    train: TokenStream
    validation: TokenStream

    @property
    def vocab_size(self) -> int:
        return self.meta.vocab_size

    @property
    def fingerprint(self) -> str:
        return self.meta.fingerprint

    @property
    def num_documents(self) -> int:
        return self.meta.num_documents

    @property
    def num_train_tokens(self) -> int:
        return self.meta.num_train_tokens

    @property
    def unigram_entropy(self) -> float:
        """H(x_t) in nats per token."""
        return self.meta.unigram_entropy

    @property
    def bigram_entropy(self) -> float:
        """H(x_t | x_{t-1}) in nats per token."""
        return self.meta.bigram_entropy

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token; end-of-document tokens count. Bits per byte: loss / this / ln 2."""
        return self.meta.num_bytes / (self.meta.num_train_tokens + self.meta.num_validation_tokens)

    def summary(self) -> str:
        """A few lines for people."""
        meta = self.meta
        return "\n".join(
            (
                f"corpus      {meta.source} -> {self.folder}",
                f"documents   {meta.num_documents:,} ({meta.num_bytes:,} bytes)",
                f"tokens      {meta.num_train_tokens:,} train, {meta.num_validation_tokens:,} validation, {meta.dtype}",
                f"vocabulary  {meta.vocab_size:,} ids, {self.bytes_per_token:.3f} bytes per token",
                f"entropy     unigram {meta.unigram_entropy:.3f}, bigram {meta.bigram_entropy:.3f} nats per token "
                f"(in-sample, {meta.entropy_tokens:,} train tokens)",
                f"fingerprint {meta.fingerprint[:12]}",
            )
        )


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The smaller type that holds every id below ``vocab_size``."""
    assert vocab_size <= 2**32, "no tokenizer has so many ids"
    return "uint16" if vocab_size <= 2**16 else "uint32"


def little_endian(dtype: Literal["uint16", "uint32"]) -> np.dtype[np.unsignedinteger]:
    """The type as it lies on disk."""
    return np.dtype("<u2" if dtype == "uint16" else "<u4")


def write_meta(folder: Path, meta: Meta, tokenizer: Tokenizer) -> None:
    tokenizer.write(folder)
    (folder / META).write_text(json.dumps(dataclasses.asdict(meta), indent=2) + "\n")


def publish(partial: Path, folder: Path) -> None:
    """Make ``partial`` durable and give it its name, in this order: whoever sees ``folder`` sees all of it."""
    for path in [*partial.iterdir(), partial]:
        _sync(path)
    os.rename(partial, folder)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_bins(folder: Path, field: str) -> Corpus:
    """Open a prepared folder. Raises ConfigError naming the file, and the sizes expected and found, where it is broken.

    field: the one that named the folder, for the error.
    """
    meta = _read_meta(folder, field)
    tokenizer = read_tokenizer(folder)
    if tokenizer.hash != meta.tokenizer_hash:
        reason = f"tokenizer.json has hash {tokenizer.hash[:12]}, {META} expects {meta.tokenizer_hash[:12]}"
        raise refusal(field, str(folder), reason, ANEW)
    dtype = little_endian(meta.dtype)
    sides = {
        side: _open_stream(
            folder / f"{side}.bin", folder / f"{side}_starts.npy", dtype, num_tokens, num_documents, field
        )
        for side, num_tokens, num_documents in (
            ("train", meta.num_train_tokens, meta.num_train_documents),
            ("validation", meta.num_validation_tokens, meta.num_validation_documents),
        )
    }
    return Corpus(folder, meta, tokenizer, sides["train"], sides["validation"])


def _read_meta(folder: Path, field: str) -> Meta:
    path = folder / META
    try:
        content = json.loads(path.read_bytes())
        version = content.get("version") if isinstance(content, dict) else None
        if version != VERSION:
            raise refusal(field, str(path), f"version {version}, this moetrain reads {VERSION}", ANEW)
        return Meta(**content)
    except OSError as error:
        reason = "the folder holds no prepared data" if folder.is_dir() else "there is no such folder"
        raise refusal(field, str(path), reason, "give the folder that `moetrain data prepare` printed") from error
    except ValidationError as error:
        mistakes = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise refusal(field, str(path), f"it is broken ({mistakes})", ANEW) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise refusal(field, str(path), f"it is broken ({error})", ANEW) from error


def _open_stream(
    path: Path, starts_path: Path, dtype: np.dtype[np.unsignedinteger], num_tokens: int, num_documents: int, field: str
) -> TokenStream:
    _check_size(path, num_tokens * dtype.itemsize, field)
    _check_size(starts_path, NPY_HEADER + 8 * num_documents, field)
    try:
        starts = np.load(starts_path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise refusal(field, str(starts_path), f"it is no .npy file: {error}", ANEW) from error
    return TokenStream(np.memmap(path, dtype=dtype, mode="r").view(np.ndarray), starts.view(np.ndarray))


def write_starts(folder: Path, side: str, starts: NDArray[np.int64]) -> None:
    np.save(folder / f"{side}_starts.npy", starts.astype("<i8"), allow_pickle=False)


def _check_size(path: Path, expected: int, field: str) -> None:
    found = path.stat().st_size if path.exists() else None
    if found != expected:
        reason = f"expected {expected:,} bytes, found {'no file' if found is None else f'{found:,}'}"
        raise refusal(field, str(path), reason, ANEW)
