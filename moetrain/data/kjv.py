"""The text that ships: the King James Bible, one document a chapter. shipped/KJV.md says where it comes from."""

from __future__ import annotations

import lzma

from moetrain.data.tokenizer import SHIPPED

KJV_TEXT = SHIPPED / "kjv.txt.xz"


def kjv_documents() -> list[str]:
    """The 1189 chapters in order, verses as lines, without titles or numbers."""
    return lzma.decompress(KJV_TEXT.read_bytes()).decode().split("\n\n")
