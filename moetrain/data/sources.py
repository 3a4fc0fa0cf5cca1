"""Where documents come from. Each source gives an identity, known before anything is read, and a stream of texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moetrain.config import DataConfig
from moetrain.data.domains import BY_PATH, FIELD, domain_of, missing
from moetrain.data.errors import refusal
from moetrain.data.kjv import KJV_TEXT, kjv_documents

SMALL_BYTES = 64 * 2**20
SUFFIXES = {"text": (".txt", ".md"), "jsonl": (".jsonl",), "parquet": (".parquet",)}
ROWS = 1024


@dataclass(frozen=True)
class Raw:
    """A document as its source has it. domain: the name of where it comes from; None: not asked for, or not said."""

    text: str
    domain: str | None = None


@dataclass(frozen=True)
class Source:
    """A corpus not read yet. identity: changes with the content. documents: a fresh stream at each call."""

    name: str
    identity: str
    documents: Callable[[], Iterator[Raw]]


def open_source(data: DataConfig) -> Source:
    """The source that ``data`` describes (all but ``bins``).

    The identity of files is the SHA-256 of their names, below ``data.path``, and contents; above 64 MiB in all, of
    names, sizes and modification times, so that a cached corpus of any size is found at once. A data set of the hub is
    known by name, subset and split only: where it has changed, delete its folder in the cache. Raises ConfigError.
    """
    if data.subset is not None and data.source != "hub":
        raise refusal("data.subset", data.subset, f"data.source={data.source} has no subsets", "leave it out")
    _check_domain_field(data)
    if data.source == "kjv":
        if data.path is not None:
            raise refusal("data.path", data.path, "data.source=kjv reads no path", "leave it out or choose a source")
        identity = hashlib.sha256(KJV_TEXT.read_bytes()).hexdigest()
        return Source("kjv", identity, lambda: (Raw(text) for text in kjv_documents()))
    if data.path is None:
        raise refusal("data.path", None, f"data.source={data.source} needs it", "name what to read")
    path = Path(data.path).expanduser()
    if data.source == "hub":
        identity = _identity(path, _files_below(path)) if path.exists() else _digest([data.path])
        identity = _digest([identity, data.subset or "", data.split])
        return Source(data.path, identity, partial(_hub_documents, data))
    files = _find_files(data.source, data.path, path)
    if data.source == "text":
        return Source(data.path, _identity(path, files), partial(_text_documents, files, path, data.domain_field))
    read = {"jsonl": _jsonl_documents, "parquet": _parquet_documents}[data.source]
    return Source(data.path, _identity(path, files), partial(read, files, data.field, data.domain_field))


def _check_domain_field(data: DataConfig) -> None:
    """Text files have no columns: what they are called by is the folder below ``data.path``, or the file itself."""
    if data.domain_field is None:
        return
    if data.source == "kjv":
        raise refusal(FIELD, data.domain_field, "data.source=kjv has no domains", "leave it null")
    if data.source == "text" and data.domain_field not in BY_PATH:
        reason = "data.source=text has no columns"
        raise refusal(FIELD, data.domain_field, reason, f"choose {' or '.join(BY_PATH)}, or leave it null")


def _find_files(source: str, name: str, path: Path) -> list[Path]:
    suffixes = SUFFIXES[source]
    kinds = " or ".join(suffixes)
    if not path.exists():
        raise refusal("data.path", name, "it does not exist", f"give a folder of {kinds} files, or one such file")
    if path.is_file():
        if path.suffix not in suffixes:
            reason = f"{path.suffix or 'a name without an ending'} is no file type of data.source={source}"
            raise refusal("data.path", name, reason, f"give {kinds}, or choose another data.source")
        return [path]
    files = [file for file in _files_below(path) if file.suffix in suffixes]
    if not files:
        raise refusal("data.path", name, f"no {kinds} file lies below it", "give another folder or data.source")
    return files


def _files_below(path: Path) -> list[Path]:
    """All files below a folder (or the file itself), sorted by their path parts."""
    return sorted((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.parts) if path.is_dir() else [path]


def _identity(root: Path, files: list[Path]) -> str:
    names = [file.relative_to(root).as_posix() if file != root else file.name for file in files]
    stats = [file.stat() for file in files]
    if sum(stat.st_size for stat in stats) > SMALL_BYTES:
        return _digest(f"{name}\0{s.st_size}\0{s.st_mtime_ns}" for name, s in zip(names, stats, strict=True))
    contents = (hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    return _digest(f"{name}\0{content}" for name, content in zip(names, contents, strict=True))


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()


def _text_documents(files: list[Path], root: Path, domain: str | None) -> Iterator[Raw]:
    """Each file is a document and is held in memory whole."""
    return (Raw(_decode(file.read_bytes(), str(file)), _domain_of_file(file, root, domain)) for file in files)


def _domain_of_file(file: Path, root: Path, domain: str | None) -> str | None:
    """The first folder below ``root`` that it lies in (None if it lies in none), or its path below ``root``."""
    if domain is None:
        return None
    below = file.relative_to(root) if file != root else Path(file.name)
    if domain == "file":
        return below.as_posix()
    return below.parts[0] if len(below.parts) > 1 else None


def _jsonl_documents(files: list[Path], field: str, domain: str | None) -> Iterator[Raw]:
    for file in files:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"line {number} of {file}"
                    yield _raw(_parse(line, where), field, domain, where)


def _parquet_documents(files: list[Path], field: str, domain: str | None) -> Iterator[Raw]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    for file in files:
        try:
            table = ParquetFile(file)
        except ArrowInvalid as error:
            reason = f"{file} cannot be read as parquet: {error}"
            raise refusal("data.path", str(file), reason, "remove or replace this file") from error
        with table:
            if field not in table.schema_arrow.names:
                raise _missing(field, str(file), table.schema_arrow.names)
            if domain is not None and domain not in table.schema_arrow.names:
                raise missing(domain, str(file), table.schema_arrow.names)
            columns = [field] if domain in (None, field) else [field, domain]
            rows = (row for batch in table.iter_batches(ROWS, columns=columns) for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield _raw(row, field, domain, f"row {number} of {file}")


def _hub_documents(data: DataConfig) -> Iterator[Raw]:
    import datasets

    try:
        rows = datasets.load_dataset(data.path, name=data.subset, split=data.split, streaming=True)
    except (OSError, ValueError) as error:
        reason = f"datasets cannot load it: {error}"
        raise refusal("data.path", data.path, reason, "check data.path, data.subset and data.split") from error
    for number, row in enumerate(rows, start=1):
        yield _raw(row, data.field, data.domain_field, f"row {number} of {data.path}")


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is no UTF-8"
        raise refusal("data.path", where, reason, "convert it to UTF-8") from error


def _parse(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(_decode(line, where))
    except json.JSONDecodeError as error:
        raise refusal("data.path", where, f"it is no JSON: {error}", "mend or remove this line") from error
    if not isinstance(row, dict):
        raise refusal("data.path", where, f"it holds no object but {row!r:.40}", "mend or remove this line")
    return row


def _raw(row: Mapping[str, Any], field: str, domain: str | None, where: str) -> Raw:
    return Raw(_text_of(row, field, where), None if domain is None else domain_of(row, domain, where))


def _text_of(row: Mapping[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise _missing(field, where, list(row))
    text = row[field]
    if not isinstance(text, str):
        reason = f"{where} holds {text!r:.40} there, no text"
        raise refusal("data.field", field, reason, "choose a field of texts, or remove such rows")
    return text


def _missing(field: str, where: str, names: Iterable[str]) -> Exception:
    return refusal("data.field", field, f"{where} has no such field", f"choose one of {', '.join(names)}")
