"""The rules of a corpus: what has to be there before it is read."""

from __future__ import annotations

import os

from moetrain.types import Problem

TOKENIZERS = ("kjv", "byte")


def data_at_path(source: str, path: str | None) -> Problem | None:
    if source == "kjv":
        if path is None:
            return None
        reason = "data.source = kjv ships with moetrain and reads no path"
        return Problem(
            "data.path", path, reason, "choose data=text | jsonl | parquet | hub | bins, or leave data.path out"
        )
    if path is None:
        what = "the name of a data set" if source == "hub" else "a file or a folder"
        reason = f"data.source = {source} needs {what}"
        return Problem("data.path", path, reason, f"set data.path={'owner/name' if source == 'hub' else '/path/to/it'}")
    at = os.path.expanduser(path)  # unlike those of Path, these take any text
    if source != "hub" and not os.path.exists(at):
        reason = f"nothing exists at {os.path.abspath(at)}"
        return Problem("data.path", path, reason, "correct data.path; a relative one starts at the working folder")
    return None


def tokenizer_found(tokenizer: str) -> Problem | None:
    if tokenizer in TOKENIZERS or os.path.isfile(os.path.expanduser(tokenizer)):
        return None
    fix = f"set data.tokenizer={' | '.join(TOKENIZERS)}, or the path of a tokenizer.json"
    return Problem("data.tokenizer", tokenizer, "is no tokenizer that ships, and no file is there", fix)
