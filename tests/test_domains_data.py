"""Where documents come from: read with them, kept beside the bins, given with every token, and refused clearly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from moetrain.config import DataConfig
from moetrain.data import Corpus, Loader, prepare
from moetrain.data.domains import MAX_DOMAINS, OTHER, DomainNames
from moetrain.types import ConfigError

LETTERS = {"poems": "p", "laws": "l", None: "x"}
ROWS = [(name, LETTERS[name] * (10 + i)) for i, name in enumerate(("laws", "poems", None, "poems", "laws") * 8)]


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def write(root: Path, source: str) -> Path:
    """The rows as a source has them; a text file that names no domain lies in no folder."""
    if source == "text":
        for i, (name, text) in enumerate(ROWS):
            path = root / (name or "") / "below" / f"{i:02d}.txt" if name else root / f"{i:02d}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return root
    root.mkdir()
    rows = [{"id": i, "from": name, "text": text} for i, (name, text) in enumerate(ROWS)]
    if source == "jsonl":
        (root / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "train.parquet")
    return root


def data_of(root: Path, source: str, **more) -> DataConfig:
    field = {"text": "folder"}.get(source, "from")
    given = {"domain_field": field, "path": str(root / source), "cache": str(root / "cache"), **more}
    return DataConfig(source=source, tokenizer="byte", validation_fraction=0.25, **given)


def letters_and_domains(corpus: Corpus, mask_documents: bool) -> set[tuple[str, str]]:
    """(letter, name of the domain) of every token of some batches of both sides; ends of documents are left out."""
    loader = Loader(
        corpus=corpus,
        context=16,
        micro_batch=4,
        accumulation=1,
        rank=0,
        world_size=1,
        seed=1,
        mask_documents=mask_documents,
    )
    batches = [loader.train(step, 0) for step in range(20)] + [loader.validation(step) for step in range(8)]
    assert all((batch.document_BS is not None) == mask_documents for batch in batches)
    tokens = np.concatenate([batch.tokens_BS.flatten().numpy() for batch in batches])
    domains = np.concatenate([batch.domain_BS.flatten().numpy() for batch in batches])
    return {(chr(token), corpus.domains[d]) for token, d in zip(tokens, domains, strict=True) if token != 256}


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet", "hub"])
def test_every_token_has_the_domain_of_its_document(source, tmp_path):
    write(tmp_path / source, source)
    corpus = prepare(data_of(tmp_path, source), context=16)
    assert corpus.domains == ("laws", "poems", OTHER)
    for mask_documents in (False, True):
        assert letters_and_domains(corpus, mask_documents) == {("l", "laws"), ("p", "poems"), ("x", OTHER)}
    assert "laws, poems, other" in corpus.summary()
    again = prepare(DataConfig(source="bins", path=str(corpus.folder)), context=16)
    assert again.domains == corpus.domains
    assert again.validation.domains.tolist() == corpus.validation.domains.tolist()


def test_a_document_that_is_cut_is_of_the_same_domain_on_both_sides(tmp_path):
    (tmp_path / "jsonl").mkdir()
    rows = [{"from": name, "text": LETTERS[name] * 400} for name in ("poems", "laws")]
    (tmp_path / "jsonl" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = prepare(data_of(tmp_path, "jsonl"), context=16)
    assert corpus.meta.num_train_documents + corpus.meta.num_validation_documents == 3
    assert letters_and_domains(corpus, mask_documents=False) == {("l", "laws"), ("p", "poems")}


def test_without_domains_the_files_are_those_that_they_were(tmp_path):
    """Nothing that older bins have not, the same tokens, and the fingerprint says which is which."""
    write(tmp_path / "jsonl", "jsonl")
    named, plain = (prepare(data_of(tmp_path, "jsonl", domain_field=f), context=16) for f in ("from", None))
    files = ["meta.json", "train.bin", "train_starts.npy", "validation.bin", "validation_starts.npy"]
    assert sorted(path.name for path in plain.folder.iterdir()) == files
    assert "domains" not in json.loads((plain.folder / "meta.json").read_text())
    assert all((plain.folder / name).read_bytes() == (named.folder / name).read_bytes() for name in files[1:])
    assert plain.fingerprint != named.fingerprint
    assert plain.domains == ()
    assert plain.train.domains is None
    loader = Loader(
        corpus=plain, context=8, micro_batch=2, accumulation=1, rank=0, world_size=1, seed=0, mask_documents=True
    )
    assert loader.train(0, 0).domain_BS is None


def test_the_largest_domains_are_told_apart_and_the_rest_is_other():
    names = DomainNames()
    for i in range(40):
        names.add(f"{i:02d}")
    names.add(None)
    names.add("39")
    found = names.told_apart(np.array([*range(1, 41), 1000, 7]))
    assert found.names == (*(f"{i:02d}" for i in range(39, 39 - MAX_DOMAINS, -1)), OTHER)
    assert found.of_document[[39, 38, 8, 7, 0, 40, 41]].tolist() == [0, 1, 31, 32, 32, 32, 0]


def test_names_beyond_what_is_kept_are_other(monkeypatch):
    monkeypatch.setattr("moetrain.data.domains.MAX_NAMES", 3)
    names = DomainNames()
    for name in ("a", "b", "c", "a"):
        names.add(name)
    found = names.told_apart(np.array([1, 2, 3, 1]))
    assert found.names == ("a", "b", OTHER)
    assert found.of_document.tolist() == [0, 1, 2, 0]


def test_the_domain_of_a_text_file_can_be_the_file_itself(tmp_path):
    write(tmp_path / "text", "text")
    corpus = prepare(data_of(tmp_path, "text", domain_field="file"), context=16)
    assert len(corpus.domains) == MAX_DOMAINS + 1
    assert corpus.domains[0] == "laws/below/39.txt"


@pytest.mark.parametrize(
    ("source", "field", "reason"),
    [
        ("jsonl", "form", "line 1 of .*a.jsonl has no such field. Fix: choose one of id, from, text"),
        ("parquet", "form", "train.parquet has no such field. Fix: choose one of id, from, text"),
        ("hub", "form", "row 1 of .* has no such field. Fix: choose one of id, from, text"),
        ("text", "from", "data.source=text has no columns. Fix: choose folder or file"),
        ("jsonl", "none", "no document of .* names a domain by it"),
        ("jsonl", "list", "line 1 of .*a.jsonl holds \\[1\\] there, no name"),
    ],
)
def test_a_field_that_names_no_domain_is_refused(source, field, reason, tmp_path):
    write(tmp_path / source, source)
    if field in ("none", "list"):
        value = {"none": None, "list": [1]}[field]
        row = json.dumps({field: value, "text": "some text that is long enough"})
        (tmp_path / "jsonl" / "a.jsonl").write_text(f"{row}\n" * 4)
    with pytest.raises(ConfigError, match=f"data.domain_field = '{field}': .*{reason}"):
        prepare(data_of(tmp_path, source, domain_field=field), context=4)


@pytest.mark.parametrize(("source", "reason"), [("kjv", "has no domains"), ("bins", "it was prepared with")])
def test_a_source_without_such_a_field_is_refused(source, reason, tmp_path):
    path = None if source == "kjv" else str(tmp_path)
    with pytest.raises(ConfigError, match=f"data.domain_field = 'x': data.source={source} .*{reason}"):
        prepare(DataConfig(source=source, path=path, domain_field="x", cache=str(tmp_path)), context=4)


def test_a_damaged_table_of_domains_is_named(tmp_path):
    write(tmp_path / "jsonl", "jsonl")
    corpus = prepare(data_of(tmp_path, "jsonl"), context=16)
    (corpus.folder / "train_domains.npy").unlink()
    with pytest.raises(ConfigError, match=r"train_domains\.npy.*found no file"):
        prepare(data_of(tmp_path, "jsonl"), context=16)
