"""From a data section to an open corpus: prepared once per content, whoever asks and however often."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from moetrain.config import DataConfig
from moetrain.data.bins import VERSION, Corpus, open_bins
from moetrain.data.build import build
from moetrain.data.domains import FIELD
from moetrain.data.errors import refusal
from moetrain.data.lock import exclusive
from moetrain.data.sources import Source, open_source
from moetrain.data.tokenizer import Tokenizer, load_tokenizer


def prepare(data: DataConfig, *, context: int, vocab_size: int | None = None) -> Corpus:
    """The corpus that ``data`` describes: tokenised now, or found in ``data.cache/<source>-<fingerprint[:12]>``.

    The fingerprint is that of the source (``open_source`` says what stands for its content), the tokenizer and the
    settings that change the bins. Any number of processes may call this at once: one works, the others wait for it.
    With ``data.source=bins`` the folder ``data.path`` is opened as it is; its own tokenizer and domains are used.

    context: the corpus must hold a sample of ``context + 1`` tokens on either side of the split.
    vocab_size: of the model, if fixed; the tokenizer's must not be greater.
    Raises ConfigError (a ValueError) for every mistake of the user's.
    """
    if data.source == "bins":
        if data.path is None:
            raise refusal("data.path", None, "data.source=bins needs it", "give a folder of prepared bins")
        if data.domain_field is not None:
            fix = "leave it null, and name it where the bins are prepared"
            raise refusal(FIELD, data.domain_field, "data.source=bins has the domains it was prepared with", fix)
        corpus = open_bins(Path(data.path).expanduser(), "data.path")
    else:
        corpus = _from_cache(data, open_source(data), load_tokenizer(data.tokenizer))
    _check_fit(corpus, context, vocab_size)
    return corpus


def _from_cache(data: DataConfig, source: Source, tokenizer: Tokenizer) -> Corpus:
    fingerprint = _fingerprint(data, source, tokenizer)
    name = f"{data.source}-{fingerprint[:12]}"
    cache = Path(data.cache).expanduser()
    folder = cache / name
    if not folder.exists():
        with exclusive(cache / f".{name}.lock"):
            if not folder.exists():
                partial, fraction = cache / f".{name}.partial", data.validation_fraction
                build(partial, folder, source, tokenizer, fingerprint, fraction, data.domain_field)
    return open_bins(folder, "data.cache")


def _fingerprint(data: DataConfig, source: Source, tokenizer: Tokenizer) -> str:
    parts = {
        "version": VERSION,
        "source": data.source,
        "identity": source.identity,
        "field": data.field if data.source in ("jsonl", "parquet", "hub") else None,
        "tokenizer": tokenizer.hash,
        "validation_fraction": data.validation_fraction,
    }
    if data.domain_field is not None:
        parts["domain_field"] = data.domain_field
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _check_fit(corpus: Corpus, context: int, vocab_size: int | None) -> None:
    meta, needed = corpus.meta, context + 1
    if vocab_size is not None and meta.vocab_size > vocab_size:
        reason = f"the tokenizer has {meta.vocab_size:,} ids"
        raise refusal("model.vocab_size", vocab_size, reason, f"leave it null, or give at least {meta.vocab_size}")
    if meta.num_train_tokens < needed:
        reason = f"{meta.source} holds {meta.num_train_tokens:,} train tokens, one sample takes {needed:,}"
        raise refusal("model.context", context, reason, "give more text or a smaller context")
    if meta.num_validation_tokens < needed:
        reason = f"{meta.source} holds {meta.num_validation_tokens:,} validation tokens, one sample takes {needed:,}"
        raise refusal("model.context", context, reason, "raise data.validation_fraction, or give a smaller context")
