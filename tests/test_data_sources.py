"""Each source gives its documents in order, and each mistake is one error naming field, value, reason and fix."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from moetrain.config import DataConfig
from moetrain.data import prepare
from moetrain.data.sources import open_source
from moetrain.types import ConfigError

TEXTS = ["First.\nTwo lines.", "Zweites, mit Umlaut: ä 🙂", "third " * 30]


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)))
    return path


def write_parquet(path: Path, texts: list[str | None], field: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), field: texts}), path)
    return path


def documents(**data) -> list[str]:
    return [raw.text for raw in open_source(DataConfig(**data)).documents()]


def test_text_takes_every_text_file_below_a_folder_in_order(tmp_path):
    root = tmp_path / "texts"
    for name, text in {"b/2.md": TEXTS[1], "a.txt": TEXTS[0], "b/c/3.txt": TEXTS[2], "b/x.py": "no"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    assert documents(source="text", path=str(root)) == TEXTS
    assert documents(source="text", path=str(root / "a.txt")) == TEXTS[:1]


def test_text_is_not_changed_but_for_a_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert documents(source="text", path=str(tmp_path)) == ["one\r\ntwo\n"]


def test_jsonl(tmp_path):
    one = write_jsonl(tmp_path / "rows" / "a.jsonl", TEXTS[:2], field="body")
    write_jsonl(tmp_path / "rows" / "b.jsonl", TEXTS[2:], field="body")
    one.write_text(one.read_text() + "\n\n")
    assert documents(source="jsonl", path=str(tmp_path / "rows"), field="body") == TEXTS
    assert documents(source="jsonl", path=str(one), field="body") == TEXTS[:2]


def test_parquet(tmp_path):
    write_parquet(tmp_path / "rows" / "a.parquet", TEXTS[:2], field="body")
    write_parquet(tmp_path / "rows" / "b.parquet", TEXTS[2:], field="body")
    assert documents(source="parquet", path=str(tmp_path / "rows"), field="body") == TEXTS


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_hub_on_a_local_data_set(tmp_path, kind):
    write = {"jsonl": write_jsonl, "parquet": write_parquet}[kind]
    write(tmp_path / "set" / f"train.{kind}", TEXTS, field="body")
    write(tmp_path / "set" / f"test.{kind}", TEXTS[:1], field="body")
    assert documents(source="hub", path=str(tmp_path / "set"), field="body") == TEXTS
    assert documents(source="hub", path=str(tmp_path / "set"), field="body", split="test") == TEXTS[:1]


def test_every_source_makes_the_same_bins(tmp_path):
    texts = [f"{i} " + text for i, text in enumerate(TEXTS * 4)]
    for i, text in enumerate(texts):
        path = tmp_path / "text" / f"{i:02d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    write_jsonl(tmp_path / "jsonl" / "a.jsonl", texts)
    write_parquet(tmp_path / "parquet" / "a.parquet", texts)
    bins = []
    for source, folder in (("text", "text"), ("jsonl", "jsonl"), ("parquet", "parquet"), ("hub", "parquet")):
        data = DataConfig(
            source=source, path=str(tmp_path / folder), cache=str(tmp_path / "cache"), validation_fraction=0.2
        )
        corpus = prepare(data, context=8)
        bins.append(
            [(corpus.folder / name).read_bytes() for name in ("train.bin", "validation.bin", "train_starts.npy")]
        )
    assert all(one == bins[0] for one in bins)


def test_hub_names_differ_by_subset_and_split():
    seen = {
        open_source(DataConfig(source="hub", path=path, subset=subset, split=split)).identity
        for path in ("some/name", "other/name")
        for subset in (None, "en")
        for split in ("train", "test")
    }
    assert len(seen) == 8


def test_documents_without_text_are_left_out(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["", *TEXTS, ""])
    corpus = prepare(
        DataConfig(source="jsonl", path=str(path), cache=str(tmp_path), validation_fraction=0.2), context=4
    )
    assert corpus.num_documents == 3


def refused(tmp_path: Path, **data) -> str:
    with pytest.raises(ConfigError) as error:
        prepare(DataConfig(cache=str(tmp_path / "cache"), **data), context=4)
    assert len(error.value.problems) == 1
    return str(error.value)


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet", "hub", "bins"])
def test_a_source_without_its_path(tmp_path, source):
    assert refused(tmp_path, source=source).startswith(f"data.path = None: data.source={source} needs it. Fix: ")


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet"])
def test_paths_that_hold_nothing_to_read(tmp_path, source):
    assert "data.path" in refused(tmp_path, source=source, path=str(tmp_path / "none"))
    assert "does not exist" in refused(tmp_path, source=source, path=str(tmp_path / "none"))
    (tmp_path / "a.csv").write_text("x")
    assert "file lies below it" in refused(tmp_path, source=source, path=str(tmp_path))
    assert ".csv is no file type of data.source" in refused(tmp_path, source=source, path=str(tmp_path / "a.csv"))


def test_settings_that_would_be_ignored(tmp_path):
    assert "data.path = 'x': data.source=kjv reads no path" in refused(tmp_path, path="x")
    assert "data.subset = 'en'" in refused(tmp_path, source="text", path=str(tmp_path), subset="en")


def test_no_text_at_all(tmp_path):
    (tmp_path / "a.txt").write_text("")
    assert "no document in it has any text" in refused(tmp_path, source="text", path=str(tmp_path))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_a_missing_field_names_what_there_is(tmp_path, kind):
    write = write_jsonl if kind == "jsonl" else write_parquet
    path = write(tmp_path / "set" / f"train.{'jsonl' if kind == 'jsonl' else 'parquet'}", TEXTS, field="body")
    message = refused(tmp_path, source=kind, path=str(path.parent), field="texd")
    assert message.startswith("data.field = 'texd': ")
    assert "choose one of id, body" in message


def test_a_row_without_text_is_named(tmp_path):
    message = refused(tmp_path, source="parquet", path=str(write_parquet(tmp_path / "a.parquet", ["x", None])))
    assert f"data.field = 'text': row 2 of {tmp_path / 'a.parquet'} holds None there" in message
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": 3}\n')
    assert "line 2 of" in refused(tmp_path, source="jsonl", path=str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("line", "reason"),
    [("{", "it is no JSON"), ("[1]", "it holds no object"), ('{"text": "\\ud83d"}', "half of a surrogate pair")],
)
def test_a_broken_line_is_named(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    message = refused(tmp_path, source="jsonl", path=str(tmp_path / "a.jsonl"))
    assert reason in message
    assert "2 of" in message


def test_a_broken_parquet_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    assert "cannot be read as parquet" in refused(tmp_path, source="parquet", path=str(tmp_path))


def test_a_data_set_that_cannot_be_loaded(tmp_path, monkeypatch):
    """Offline, or it would be tried again and again where there is no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    write_parquet(tmp_path / "set" / "train.parquet", TEXTS)
    assert "datasets cannot load it" in refused(tmp_path, source="hub", path=str(tmp_path / "set"), split="nope")
    assert "datasets cannot load it" in refused(tmp_path, source="hub", path="no-such/data-set")
