"""One preparation: read, tokenise, split, count, publish. Memory: a batch of documents, and 18 bytes per document."""

from __future__ import annotations

import hashlib
import os
import shutil
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moetrain.data.bins import VERSION, Meta, little_endian, publish, token_dtype, write_domains, write_meta
from moetrain.data.domains import FIELD, OTHER, DomainNames, Domains
from moetrain.data.entropy import entropies
from moetrain.data.errors import refusal
from moetrain.data.progress import Progress
from moetrain.data.sources import Raw, Source
from moetrain.data.split import Split, split_documents, write_split
from moetrain.data.tokenizer import Tokenizer

BATCH_BYTES = 2**20
BATCH_DOCUMENTS = 1024
STREAM = "stream.bin"


@dataclass(frozen=True, eq=False)
class Documents:
    """What is remembered of each document once it is tokenised: [num documents] each. domains: if asked for."""

    starts: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    domains: Domains | None


@dataclass(frozen=True)
class Document:
    """A text, its length in UTF-8, a hash of it (64 bits), and the name of its domain."""

    text: str
    num_bytes: int
    hash: int
    domain: str | None


def build(
    partial: Path,
    folder: Path,
    source: Source,
    tokenizer: Tokenizer,
    fingerprint: str,
    validation_fraction: float,
    domain_field: str | None,
) -> None:
    """Prepare ``source`` in ``partial`` and rename it to ``folder``; the caller holds the lock of this name.

    What an earlier process left when it was killed is removed first; so is our own part if anything goes wrong.
    """
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with Progress(f"preparing {source.name}") as progress:
            documents = _tokenise(source, tokenizer, partial / STREAM, progress, domain_field)
            progress.say(f"splitting and counting {progress.num_tokens:,} tokens")
            tokens = np.memmap(partial / STREAM, dtype=_dtype(tokenizer), mode="r")
            split = split_documents(documents.starts, documents.hashes, len(tokens), validation_fraction)
            write_split(partial, tokens, split)
            os.remove(partial / STREAM)
            domains = _write_domains(partial, documents, split)
            meta = _meta(partial, source, tokenizer, fingerprint, progress, split, domains)
        write_meta(partial, meta, tokenizer)
        publish(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _dtype(tokenizer: Tokenizer) -> np.dtype[np.unsignedinteger]:
    return little_endian(token_dtype(tokenizer.vocab_size))


def _tokenise(
    source: Source, tokenizer: Tokenizer, path: Path, progress: Progress, domain_field: str | None
) -> Documents:
    """Write all documents end to end into ``path``, each closed by an end-of-document token."""
    starts, hashes, names = array("q"), array("Q"), DomainNames()
    with path.open("wb") as file:
        for batch in _batches(source):
            ids = [np.append(i, tokenizer.end_of_document) for i in tokenizer.encode_batch([d.text for d in batch])]
            lengths = np.array([len(i) for i in ids])
            starts.extend((progress.num_tokens + np.cumsum(lengths) - lengths).tolist())
            hashes.extend(document.hash for document in batch)
            for document in batch:
                names.add(document.domain)
            file.write(np.concatenate(ids).astype(_dtype(tokenizer)).tobytes())
            progress.add(len(batch), sum(document.num_bytes for document in batch), int(lengths.sum()))
    if not starts:
        reason = "no document in it has any text"
        raise refusal("data.path", source.name, reason, "give a source that has text")
    starts_at = np.array(starts, dtype=np.int64)
    domains = None
    if domain_field is not None:
        domains = names.told_apart(np.diff(starts_at, append=progress.num_tokens))
        if domains.names == (OTHER,):
            fix = "choose one that tells documents apart, or leave it null"
            raise refusal(FIELD, domain_field, f"no document of {source.name} names a domain by it", fix)
    return Documents(starts_at, np.array(hashes, dtype=np.uint64), domains)


def _batches(source: Source) -> Iterator[list[Document]]:
    """Documents in batches of some megabytes. Documents without any text are left out."""
    batch: list[Document] = []
    num_bytes = 0
    for number, raw in enumerate(source.documents(), start=1):
        if not raw.text:
            continue
        batch.append(_document(raw, f"document {number} of {source.name}"))
        num_bytes += batch[-1].num_bytes
        if num_bytes >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _document(raw: Raw, where: str) -> Document:
    try:
        content = raw.text.encode()
    except UnicodeEncodeError as error:
        reason = f"half of a surrogate pair stands at character {error.start}"
        raise refusal("data.path", where, reason, "mend this document") from error
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return Document(raw.text, len(content), int.from_bytes(digest, "little"), raw.domain)


def _write_domains(partial: Path, documents: Documents, split: Split) -> tuple[str, ...]:
    """Of the documents on both sides; the end of one that was cut is of the same domain. Returns the names."""
    if documents.domains is None:
        return ()
    document = np.searchsorted(documents.starts, split.starts, side="right") - 1
    domains = documents.domains.of_document[document]
    for validation, side in ((False, "train"), (True, "validation")):
        write_domains(partial, side, domains[split.in_validation == validation])
    return documents.domains.names


def _meta(
    partial: Path,
    source: Source,
    tokenizer: Tokenizer,
    fingerprint: str,
    progress: Progress,
    split: Split,
    domains: tuple[str, ...],
) -> Meta:
    counted = entropies(np.memmap(partial / "train.bin", dtype=_dtype(tokenizer), mode="r"), tokenizer.vocab_size)
    return Meta(
        version=VERSION,
        source=source.name,
        fingerprint=fingerprint,
        dtype=token_dtype(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        tokenizer_hash=tokenizer.hash,
        num_documents=progress.num_documents,
        num_bytes=progress.num_bytes,
        num_train_tokens=split.num_tokens_on(validation=False),
        num_train_documents=int((~split.in_validation).sum()),
        num_validation_tokens=split.num_tokens_on(validation=True),
        num_validation_documents=int(split.in_validation.sum()),
        unigram_entropy=counted.unigram,
        bigram_entropy=counted.bigram,
        entropy_tokens=counted.num_tokens,
        domains=domains,
    )
