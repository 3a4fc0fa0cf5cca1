"""Prepared corpora on disk: flat bins of token ids, where the documents start, and what is known about them.

A folder holds ``train.bin``, ``validation.bin`` (little-endian uint16 or uint32, documents end to end, each closed by
an end-of-document token), ``train_starts.npy``, ``validation_starts.npy`` (int64, the position of each document's first
token), ``meta.json`` and, unless the tokens are bytes, ``tokenizer.json``. Where domains are told apart there are also
``train_domains.npy`` and ``validation_domains.npy`` (uint8, the domain of each document, whose names are in
``meta.json``). It appears whole, by a rename, or never.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
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
    document that is cut at the split counts on both sides. domains: names of those told apart; empty: none are.
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
    domains: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class TokenStream:
    """One side of a corpus. tokens: [num tokens], memory-mapped. starts: int64 [num documents], ascending, first 0.

    domains: uint8 [num documents], positions in ``Corpus.domains``; None where no domains are told apart.
    """

    tokens: NDArray[np.unsignedinteger]
    starts: NDArray[np.int64]
    domains: NDArray[np.uint8] | None = None


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
    def domains(self) -> tuple[str, ...]:
        """Names of the domains told apart; empty if none are."""
        return self.meta.domains

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
        domains = (f"domains     {', '.join(meta.domains)}",) if meta.domains else ()
        return "\n".join(
            (
                f"corpus      {meta.source} -> {self.folder}",
                f"documents   {meta.num_documents:,} ({meta.num_bytes:,} bytes)",
                f"tokens      {meta.num_train_tokens:,} train, {meta.num_validation_tokens:,} validation, {meta.dtype}",
                f"vocabulary  {meta.vocab_size:,} ids, {self.bytes_per_token:.3f} bytes per token",
                f"entropy     unigram {meta.unigram_entropy:.3f}, bigram {meta.bigram_entropy:.3f} nats per token "
                f"(in-sample, {meta.entropy_tokens:,} train tokens)",
                *domains,
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
    """A corpus without domains says nothing of them."""
    tokenizer.write(folder)
    content = {name: value for name, value in dataclasses.asdict(meta).items() if name != "domains" or value}
    (folder / META).write_text(json.dumps(content, indent=2) + "\n")


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
    if (tokenizer.hash, tokenizer.vocab_size) != (meta.tokenizer_hash, meta.vocab_size):
        reason = f"tokenizer.json has hash {tokenizer.hash[:12]} and {tokenizer.vocab_size} ids, {META} expects"
        raise refusal(field, str(folder), f"{reason} {meta.tokenizer_hash[:12]} and {meta.vocab_size}", ANEW)
    dtype = little_endian(meta.dtype)
    sides = {
        side: _open_stream(folder, side, dtype, num_tokens, num_documents, bool(meta.domains), field)
        for side, num_tokens, num_documents in (
            ("train", meta.num_train_tokens, meta.num_train_documents),
            ("validation", meta.num_validation_tokens, meta.num_validation_documents),
        )
    }
    return Corpus(folder, meta, tokenizer, sides["train"], sides["validation"])


def _read_meta(folder: Path, field: str) -> Meta:
    path = folder / META
    try:
        text = path.read_bytes()
        content = json.loads(text)
        version = content.get("version") if isinstance(content, dict) else None
        if version != VERSION:
            raise refusal(field, str(path), f"version {version}, this moetrain reads {VERSION}", ANEW)
        return TypeAdapter(Meta).validate_json(text)
    except OSError as error:
        reason = "the folder holds no prepared data" if folder.is_dir() else "there is no such folder"
        raise refusal(field, str(path), reason, "give the folder that `moetrain data prepare` printed") from error
    except ValidationError as error:
        mistakes = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise refusal(field, str(path), f"it is broken ({mistakes})", ANEW) from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise refusal(field, str(path), f"it is broken ({error})", ANEW) from error


def _open_stream(
    folder: Path,
    side: str,
    dtype: np.dtype[np.unsignedinteger],
    num_tokens: int,
    num_documents: int,
    has_domains: bool,
    field: str,
) -> TokenStream:
    path = folder / f"{side}.bin"
    if num_tokens < 1 or num_documents < 1:
        raise refusal(field, str(folder / META), f"{num_tokens} tokens in {num_documents} documents for {side}", ANEW)
    _check_size(path, num_tokens * dtype.itemsize, field)
    starts = _open_array(folder / f"{side}_starts.npy", np.dtype("<i8"), num_documents, field)
    if starts[0] != 0 or starts[-1] >= num_tokens:
        reason = f"documents start at {starts[0]} to {starts[-1]}, tokens are 0 to {num_tokens - 1}"
        raise refusal(field, str(folder / f"{side}_starts.npy"), reason, ANEW)
    domains = _open_array(folder / f"{side}_domains.npy", np.dtype("u1"), num_documents, field) if has_domains else None
    return TokenStream(np.memmap(path, dtype=dtype, mode="r").view(np.ndarray), starts, domains)


def _open_array(path: Path, dtype: np.dtype[Any], length: int, field: str) -> NDArray[Any]:
    _check_size(path, NPY_HEADER + dtype.itemsize * length, field)
    try:
        found: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    except Exception as error:  # numpy evaluates a header as a literal, which fails in many ways
        raise refusal(field, str(path), f"it is no .npy file: {error}", ANEW) from error
    if found.dtype != dtype or found.shape != (length,):
        reason = f"it holds {found.dtype} {list(found.shape)}, and should hold {dtype} [{length}]"
        raise refusal(field, str(path), reason, ANEW)
    return found


def write_starts(folder: Path, side: str, starts: NDArray[np.int64]) -> None:
    np.save(folder / f"{side}_starts.npy", starts.astype("<i8"), allow_pickle=False)


def write_domains(folder: Path, side: str, domains: NDArray[np.uint8]) -> None:
    np.save(folder / f"{side}_domains.npy", domains, allow_pickle=False)


def _check_size(path: Path, expected: int, field: str) -> None:
    found = path.stat().st_size if path.exists() else None
    if found != expected:
        reason = f"expected {expected:,} bytes, found {'no file' if found is None else f'{found:,}'}"
        raise refusal(field, str(path), reason, ANEW)
