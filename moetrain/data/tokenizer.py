"""Text to token ids and back: the shipped BPE, plain bytes, or the user's own ``tokenizer.json``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as Backend

from moetrain.data.errors import refusal

SHIPPED = Path(__file__).parent / "shipped"
KJV_TOKENIZER = SHIPPED / "kjv_tokenizer.json"
END_OF_DOCUMENT = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<|im_end|>",
)


class Tokenizer(Protocol):
    """What the rest of the room knows of a tokenizer. ``hash`` is equal iff the same text gives the same ids."""

    @property
    def vocab_size(self) -> int:
        """One more than the greatest id."""

    @property
    def end_of_document(self) -> int:
        """The id written after each document; no text encodes to it."""

    @property
    def hash(self) -> str:
        """SHA-256, hexadecimal."""

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Ids of each text, without any token added before or after it."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; bytes that are no UTF-8 become U+FFFD, ids outside the vocabulary are left out."""

    def write(self, folder: Path) -> None:
        """Put what ``read_tokenizer`` needs into ``folder``."""


@dataclass(frozen=True)
class ByteTokenizer:
    """The 256 bytes of UTF-8 and an end-of-document id."""

    vocab_size: int = 257
    end_of_document: int = 256
    hash: str = hashlib.sha256(b"moetrain byte tokenizer: 256 bytes, end of document 256").hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def write(self, folder: Path) -> None:
        """Nothing to write: a folder without tokenizer.json is a folder of bytes."""


@dataclass(frozen=True)
class FileTokenizer:
    """A ``tokenizer.json`` of the tokenizers library; ``hash`` is that of the file's content."""

    content: str = field(repr=False)
    backend: Backend = field(repr=False)
    vocab_size: int
    end_of_document: int
    hash: str

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.backend.decode(list(ids), skip_special_tokens=False))

    def write(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_bytes(self.content.encode())


def _from_file(path: Path, name: str) -> FileTokenizer:
    try:
        content = path.read_bytes().decode()
        backend = Backend.from_str(content)
    except Exception as error:  # the tokenizers library raises bare Exception
        reason = f"{path} cannot be read as a tokenizer.json: {error}"
        raise refusal("data.tokenizer", name, reason, "give `kjv`, `byte` or the path of a tokenizer.json") from error
    # A file may ask for truncation, padding, or for "</s>" inside a text to end the document: a corpus wants none.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    vocab = backend.get_vocab(with_added_tokens=True)
    ends = [vocab[token] for token in END_OF_DOCUMENT if token in vocab]
    if not ends:
        reason = f"{path} has no end-of-document token (looked for {', '.join(END_OF_DOCUMENT)})"
        raise refusal("data.tokenizer", name, reason, "add `<|endoftext|>` to it as a special token")
    return FileTokenizer(content, backend, max(vocab.values()) + 1, ends[0], _sha256(content))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that ``data.tokenizer`` names: ``kjv``, ``byte`` or a path. Raises ConfigError."""
    if name == "byte":
        return ByteTokenizer()
    return _from_file(KJV_TOKENIZER if name == "kjv" else Path(name).expanduser(), name)


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that ``Tokenizer.write`` left in ``folder``."""
    path = folder / "tokenizer.json"
    return _from_file(path, str(path)) if path.exists() else ByteTokenizer()
