"""Preparation: once for many callers, whole or not at all, found again by content, and clear about what is broken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moetrain.config import DataConfig
from moetrain.data import build as build_module
from moetrain.data import load_tokenizer, prepare
from moetrain.types import ConfigError


def write_texts(root: Path, number: int = 12) -> Path:
    root.mkdir()
    for i in range(number):
        (root / f"{i:02d}.txt").write_text(f"Document {i}. " + "word " * (20 + i))
    return root


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    texts = write_texts(tmp_path / "texts")
    return DataConfig(
        source="text", path=str(texts), tokenizer="byte", cache=str(tmp_path / "cache"), validation_fraction=0.25
    )


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh Python, with ``data`` made from the folder and cache in ``arguments``."""
    head = """
        import os, signal, sys, time
        from moetrain.config import DataConfig
        from moetrain.data import bins, build, corpus, prepare
        folder, cache = sys.argv[1:3]
        data = DataConfig(source="text", path=folder, tokenizer="byte", cache=cache, validation_fraction=0.25)
        """
    script = textwrap.dedent(head) + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=240, check=False
    )


def test_the_bins_hold_the_documents(data):
    corpus = prepare(data, context=16)
    texts = [file.read_text() for file in sorted(Path(data.path).iterdir())]
    sides = {}
    for side in ("train", "validation"):
        tokens = np.fromfile(corpus.folder / f"{side}.bin", dtype="<u2")
        starts = np.load(corpus.folder / f"{side}_starts.npy", allow_pickle=False)
        documents = np.split(tokens, starts[1:])
        assert all(document[-1] == 256 for document in documents)
        sides[side] = [corpus.tokenizer.decode(document[:-1].tolist()) for document in documents]
    assert sorted(sides["train"] + sides["validation"]) == sorted(texts)
    assert sides["train"] == [text for text in texts if text in sides["train"]]
    assert len(sides["validation"]) >= 2
    assert corpus.num_documents == 12
    total = sum(len(text) for text in texts)
    assert corpus.num_train_tokens + corpus.meta.num_validation_tokens == total + 12
    assert corpus.bytes_per_token == pytest.approx(total / (total + 12))
    assert 0 < corpus.bigram_entropy < corpus.unigram_entropy
    assert sorted(path.name for path in corpus.folder.iterdir()) == [
        "meta.json", "train.bin", "train_starts.npy", "validation.bin", "validation_starts.npy",
    ]  # fmt: skip
    for word in (str(corpus.folder), "12", f"{corpus.num_train_tokens:,}", f"{corpus.bigram_entropy:.3f}"):
        assert word in corpus.summary()


def test_kjv_is_prepared_with_its_tokenizer(tmp_path):
    corpus = prepare(DataConfig(cache=str(tmp_path)), context=128)
    assert corpus.folder.name == f"kjv-{corpus.fingerprint[:12]}"
    assert corpus.num_documents == 1189
    assert corpus.vocab_size == 512
    assert 1.65e6 < corpus.num_train_tokens < 1.75e6
    assert 0.01 < corpus.meta.num_validation_tokens / corpus.num_train_tokens < 0.021
    assert corpus.bytes_per_token == pytest.approx(2.374, abs=0.01)
    assert corpus.unigram_entropy == pytest.approx(5.205, abs=0.01)
    assert corpus.bigram_entropy == pytest.approx(3.350, abs=0.01)


def test_batches_do_not_change_the_bins(data, tmp_path, monkeypatch):
    once = prepare(data, context=16)
    monkeypatch.setattr(build_module, "BATCH_DOCUMENTS", 5)
    again = prepare(replace(data, cache=str(tmp_path / "other")), context=16)
    for path in once.folder.iterdir():
        assert path.read_bytes() == (again.folder / path.name).read_bytes(), path.name


def test_the_cache_is_used(data, monkeypatch):
    first = prepare(data, context=16)
    monkeypatch.setattr("moetrain.data.corpus.build", lambda *_: pytest.fail("prepared twice"))
    assert prepare(data, context=16).fingerprint == first.fingerprint


def test_the_fingerprint_follows_content_tokenizer_and_settings(data, tmp_path):
    seen = {prepare(data, context=16).fingerprint}
    for other in (replace(data, tokenizer="kjv"), replace(data, validation_fraction=0.3)):
        seen.add(prepare(other, context=16).fingerprint)
    file = Path(data.path) / "03.txt"
    file.write_text(file.read_text().replace("word", "Word"))  # the same size
    seen.add(prepare(data, context=16).fingerprint)
    file.rename(file.with_name("99.txt"))
    seen.add(prepare(data, context=16).fingerprint)
    assert len(seen) == 5
    before = prepare(data, context=16).fingerprint
    moved = Path(data.path).rename(tmp_path / "moved")
    assert prepare(replace(data, path=str(moved)), context=16).fingerprint == before
    assert prepare(replace(data, path=str(moved), mask_documents=True), context=99).fingerprint == before


def test_large_sources_are_known_by_size_and_time(data, monkeypatch):
    monkeypatch.setattr("moetrain.data.sources.SMALL_BYTES", 10)
    first = prepare(data, context=16).fingerprint
    assert prepare(data, context=16).fingerprint == first
    os.utime(Path(data.path) / "00.txt", ns=(1, 1))
    assert prepare(data, context=16).fingerprint != first


@pytest.mark.parametrize("where", ["build.split_documents", "build.entropies", "build.write_meta", "bins.os.rename"])
def test_a_killed_preparation_leaves_nothing_valid_and_the_next_succeeds(data, where):
    kill = f"""
        {where} = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
        prepare(data, context=16)
        """
    died = run(kill, data.path, data.cache)
    assert died.returncode == -signal.SIGKILL, died.stderr
    left = [path.name for path in Path(data.cache).iterdir()]
    assert any(name.endswith(".partial") for name in left)
    assert all(name.startswith(".") for name in left)
    corpus = prepare(data, context=16)
    assert corpus.num_documents == 12
    assert not list(Path(data.cache).glob(".*.partial"))


def test_a_failing_preparation_cleans_up(data):
    (Path(data.path) / "zz.txt").write_bytes(b"ok \xff")
    with pytest.raises(ConfigError, match=r"data\.path = .*zz\.txt.*byte 3 is no UTF-8.*Fix: convert"):
        prepare(data, context=16)
    assert [path.name for path in Path(data.cache).iterdir() if not path.name.endswith(".lock")] == []


def test_four_processes_prepare_once(data, tmp_path):
    """Each child appends a line when it begins to build; a slow build gives the others time to collide."""
    log = tmp_path / "log"
    code = """
        def slow(*arguments):
            with open(sys.argv[3], "a") as log:
                log.write("built\\n")
            time.sleep(0.5)
            build.build(*arguments)
        corpus.build = slow
        children = []
        for _ in range(4):
            child = os.fork()
            if child == 0:
                os._exit(0 if prepare(data, context=16).num_documents == 12 else 3)
            children.append(child)
        sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
        """
    result = run(code, data.path, data.cache, str(log))
    assert result.returncode == 0, result.stderr
    assert log.read_text() == "built\n"


def test_bins_are_opened_where_they_lie(data, tmp_path):
    made = prepare(replace(data, tokenizer="kjv"), context=16)
    moved = made.folder.rename(tmp_path / "bins")
    corpus = prepare(DataConfig(source="bins", path=str(moved)), context=16)
    assert corpus.fingerprint == made.fingerprint
    assert corpus.tokenizer.hash == load_tokenizer("kjv").hash


@pytest.mark.parametrize(
    ("name", "spoil", "reason"),
    [
        ("train.bin", lambda path: os.truncate(path, path.stat().st_size - 2), r"expected [\d,]+ bytes, found [\d,]+"),
        ("validation.bin", lambda path: path.write_bytes(path.read_bytes() + b"xx"), "expected [0-9,]+ bytes, found"),
        ("train.bin", Path.unlink, "expected [0-9,]+ bytes, found no file"),
        ("train_starts.npy", lambda path: os.truncate(path, 100), "expected [0-9,]+ bytes, found 100"),
        ("train_starts.npy", lambda path: path.write_bytes(b"x" * path.stat().st_size), r"no \.npy file"),
        ("meta.json", lambda path: path.write_text("{"), "it is broken"),
        ("meta.json", lambda path: path.write_text('{"version": 99}'), "version 99"),
        ("meta.json", lambda path: path.write_text('{"version": 1}'), "it is broken .*num_train_tokens"),
        ("meta.json", Path.unlink, "holds no prepared data"),
        ("tokenizer.json", Path.unlink, "tokenizer.json has hash"),
    ],
)
def test_broken_bins_are_one_clear_error(data, name, spoil, reason):
    folder = prepare(replace(data, tokenizer="kjv"), context=16).folder
    spoil(folder / name)
    with pytest.raises(ConfigError, match=reason) as error:
        prepare(replace(data, tokenizer="kjv"), context=16)
    assert len(error.value.problems) == 1
    assert error.value.problems[0].field == "data.cache"
    assert str(folder) in str(error.value)
    with pytest.raises(ConfigError, match=reason) as error:
        prepare(DataConfig(source="bins", path=str(folder)), context=16)
    assert error.value.problems[0].field == "data.path"


def test_a_pickle_is_never_loaded(data):
    folder = prepare(data, context=16).folder
    path = folder / "train_starts.npy"
    size = path.stat().st_size
    np.save(path, np.array([{"x": 1}], dtype=object), allow_pickle=True)
    path.write_bytes(path.read_bytes().ljust(size, b"\0")[:size])
    with pytest.raises(ConfigError, match=r"no \.npy file"):
        prepare(data, context=16)


def test_a_corpus_too_short_for_its_context(data):
    with pytest.raises(ConfigError, match=r"model\.context = 100000: .* train tokens, one sample takes 100,001"):
        prepare(data, context=100_000)
    with pytest.raises(ConfigError, match=r"model\.context = 500: .* validation tokens.*data\.validation_fraction"):
        prepare(replace(data, validation_fraction=0.05), context=500)


def test_a_tokenizer_greater_than_the_model(data):
    prepare(data, context=16, vocab_size=257)
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 256: the tokenizer has 257 ids.*at least 257"):
        prepare(data, context=16, vocab_size=256)


def test_a_cache_that_cannot_be_written(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache = .*cannot be written"):
        prepare(replace(data, cache=str(tmp_path / "file" / "cache")), context=16)


def test_a_vocabulary_beyond_16_bits_takes_32(data, tmp_path):
    """Ids above 65535 survive: the shipped tokenizer with one more token, far away."""
    content = json.loads((Path(build_module.__file__).parent / "shipped" / "kjv_tokenizer.json").read_text())
    content["model"]["vocab"]["Doc"] = 70_000
    for merge in (["D", "o"], ["Do", "c"]):
        content["model"]["merges"].append(merge)
    content["model"]["vocab"].setdefault("Do", 69_999)
    path = tmp_path / "wide.json"
    path.write_text(json.dumps(content))
    corpus = prepare(replace(data, tokenizer=str(path)), context=16)
    assert corpus.meta.dtype == "uint32"
    assert corpus.vocab_size == 70_001
    assert corpus.train.tokens[0] == 70_000
    first = corpus.train.tokens[: corpus.train.starts[1] - 1]
    assert corpus.tokenizer.decode(first.tolist()).startswith("Document")
