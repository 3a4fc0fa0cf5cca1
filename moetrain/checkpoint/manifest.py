"""``manifest.json``: what a checkpoint consists of. Written last; it carries its own hash."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash
from pydantic import TypeAdapter

from moetrain.canonical import Spec
from moetrain.checkpoint.files import Written

FORMAT = 2
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class SavedBy:
    """The layout that wrote it. Only generators depend on it, and what is said about it."""

    world_size: int
    ep_size: int
    engine: str
    zero_stage: int
    device: str


@dataclass(frozen=True)
class Manifest:
    """files: by name. tensors: every canonical tensor of the model. extra: JSON-able facts of the run."""

    step: int
    saved_by: SavedBy
    files: dict[str, Written]
    tensors: dict[str, Spec]
    extra: dict[str, Any]


_READER: TypeAdapter[Manifest] = TypeAdapter(Manifest)


def to_text(manifest: Manifest) -> str:
    """Raises TypeError or ValueError if ``extra`` is not JSON."""
    body = asdict(manifest) | {"format": FORMAT}
    return json.dumps(body | {"xxh3": _hash(body)}, indent=1, allow_nan=False)


def read(path: Path) -> Manifest:
    """The manifest of the checkpoint in folder ``path``. Raises ValueError or OSError, naming the file."""
    file = path / MANIFEST
    try:
        body = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        found = body.get("format") if isinstance(body, dict) else None
        raise ValueError(f"{file} is of format {found!r:.40}, this moetrain reads format {FORMAT}")
    if body.pop("xxh3", None) != _hash(body):
        raise ValueError(f"{file} is damaged: its checksum differs")
    del body["format"]
    try:
        return _READER.validate_json(json.dumps(body), strict=True)
    except ValueError as error:
        first = str(error).splitlines()[1:3]
        raise ValueError(f"{file} says what no manifest says: {' '.join(first)}") from error


def _hash(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(body, sort_keys=True).encode()).hexdigest()
