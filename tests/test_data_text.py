"""What text turns into: tokenizers, the shipped corpus, entropies, and the split."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from math import log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moetrain.data import entropy, load_tokenizer
from moetrain.data.entropy import entropies
from moetrain.data.kjv import kjv_documents
from moetrain.data.make_kjv import VOCAB_SIZE, read_chapters, train_tokenizer
from moetrain.data.split import split_documents, write_split
from moetrain.data.tokenizer import KJV_TOKENIZER, read_tokenizer

TEXTS = ["In the beginning", "naïve 漢字 🙂 \u0000\r\n\t x", " <|endoftext|> </s>", "\ufeffmark", "a\n\n\n b  "]


@pytest.mark.parametrize("name", ["kjv", "byte"])
@pytest.mark.parametrize("text", TEXTS)
def test_decode_undoes_encode(name, text):
    tokenizer = load_tokenizer(name)
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.end_of_document not in ids
    assert ids.max() < tokenizer.vocab_size


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.text(), max_size=4))
def test_decode_undoes_encode_of_anything(texts):
    tokenizer = load_tokenizer("kjv")
    assert [tokenizer.decode(ids.tolist()) for ids in tokenizer.encode_batch(texts)] == texts


@pytest.mark.parametrize("name", ["kjv", "byte"])
def test_decode_survives_what_a_model_samples(name):
    assert "\ufffd" in load_tokenizer(name).decode([256, 255, 200, 5000])


def test_a_file_cannot_ask_for_truncation_padding_or_special_tokens(tmp_path):
    content = json.loads(KJV_TOKENIZER.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
    content["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    (mine,), (shipped,) = (load_tokenizer(n).encode_batch(["God created the heaven"]) for n in (str(path), "kjv"))
    assert mine.tolist() == shipped.tolist()


def test_a_tokenizer_written_is_read_back(tmp_path):
    for name in ("kjv", "byte"):
        folder = tmp_path / name
        folder.mkdir()
        load_tokenizer(name).write(folder)
        assert read_tokenizer(folder).hash == load_tokenizer(name).hash


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "cannot be read"), ("{}", "cannot be read"), ("no end", "has no end-of-document token")],
)
def test_a_bad_tokenizer_is_one_clear_error(tmp_path, content, reason):
    path = tmp_path / "t.json"
    if content == "no end":
        content = KJV_TOKENIZER.read_text().replace("<|endoftext|>", "<other>")
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=rf"data\.tokenizer = .*t\.json.*{reason}.*Fix: "):
        load_tokenizer(str(path))


def test_the_shipped_text_is_whole():
    chapters = kjv_documents()
    assert len(chapters) == 1189
    assert sum(chapter.count("\n") + 1 for chapter in chapters) == 31102
    assert chapters[0].startswith("In the beginning God created the heaven and the earth.\n")
    assert chapters[-1].endswith("\nThe grace of our Lord Jesus Christ be with you all. Amen.")
    text = "\n\n".join(chapters)
    assert text.isascii()
    note = (KJV_TOKENIZER.parent / "KJV.md").read_text()
    assert hashlib.sha256(text.encode()).hexdigest() in note


def test_the_shipped_tokenizer_is_made_by_its_script():
    made, shipped = (
        json.loads(train_tokenizer(kjv_documents(), VOCAB_SIZE).to_str()),
        json.loads(KJV_TOKENIZER.read_text()),
    )
    assert made["model"]["merges"] == shipped["model"]["merges"]
    assert made["model"]["vocab"] == shipped["model"]["vocab"]
    assert load_tokenizer("kjv").vocab_size == VOCAB_SIZE


def test_only_the_named_archive_makes_the_text(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"something else")
    with pytest.raises(ValueError, match="expected SHA-256"):
        read_chapters(tmp_path / "a.tar.gz")


def counted(tokens: list[int]) -> tuple[float, float]:
    """Unigram and bigram entropy of a ring, by definition."""
    n = len(tokens)
    singles, pairs = Counter(tokens), Counter(zip(tokens, tokens[1:] + tokens[:1], strict=True))
    unigram = -sum(c / n * log(c / n) for c in singles.values())
    bigram = -sum(c / n * log(c / singles[a]) for (a, _), c in pairs.items())
    return unigram, bigram


@settings(max_examples=80, deadline=None)
@given(tokens=arrays(np.uint16, st.integers(1, 60), elements=st.integers(0, 6)), chunk=st.integers(1, 9))
def test_entropies_against_a_counter(tokens, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entropy, "CHUNK", chunk)
        found = entropies(tokens, 7)
    assert (found.unigram, found.bigram) == pytest.approx(counted(tokens.tolist()), abs=1e-9)
    assert 0 <= found.bigram <= found.unigram
    assert found.num_tokens == len(tokens)


def test_entropies_of_greater_ids_and_of_a_limited_part(monkeypatch):
    tokens = np.random.default_rng(0).integers(0, 2**17, 3000).astype(np.uint32)
    assert entropies(tokens, 2**17).bigram == pytest.approx(counted(tokens.tolist())[1], abs=1e-9)
    monkeypatch.setattr(entropy, "ENTROPY_TOKENS", 1000)
    found = entropies(tokens, 2**17)
    assert found.num_tokens == 1000
    assert found.unigram == pytest.approx(counted(tokens[:1000].tolist())[0], abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=30),
    fraction=st.floats(0.001, 0.999),
    chunk=st.integers(1, 50),
    data=st.data(),
)
def test_the_split_parts_every_token_and_empties_no_side(tmp_path_factory, lengths, fraction, chunk, data):
    hashes = np.array(
        data.draw(st.lists(st.integers(0, 9), min_size=len(lengths), max_size=len(lengths))), dtype=np.uint64
    )
    total = sum(lengths)
    starts = np.cumsum([0, *lengths[:-1]])
    split = split_documents(starts, hashes, total, fraction)
    sizes = [split.num_tokens_on(validation=side) for side in (False, True)]
    assert min(sizes) > 0
    assert sum(sizes) == total
    assert sizes[1] <= max(round(fraction * total), 1)
    assert 2 * sizes[1] >= min(round(fraction * total), total - 1)

    tokens, folder = np.arange(total, dtype="<u2"), tmp_path_factory.mktemp("split")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moetrain.data.split.CHUNK", chunk)
        write_split(folder, tokens, split)
    for side, size, validation in (("train", sizes[0], False), ("validation", sizes[1], True)):
        written, begun = np.fromfile(folder / f"{side}.bin", dtype="<u2"), np.load(folder / f"{side}_starts.npy")
        assert len(written) == size
        assert (np.diff(written.astype(np.int64)) > 0).all()
        assert written[begun].tolist() == split.starts[split.in_validation == validation].tolist()


def test_one_document_is_cut_and_many_are_kept_whole():
    one = split_documents(np.array([0]), np.array([5], dtype=np.uint64), 1000, 0.1)
    assert one.starts.tolist() == [0, 900]
    assert one.in_validation.tolist() == [False, True]
    starts, hashes = np.arange(0, 1000, 10), np.random.default_rng(0).permutation(100).astype(np.uint64)
    many = split_documents(starts, hashes, 1000, 0.1)
    assert many.starts.tolist() == starts.tolist()
    assert sorted(hashes[many.in_validation].tolist()) == list(range(10))
