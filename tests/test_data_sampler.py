"""Sampling: every window once an epoch, the same samples at every world size, and a batch is a function of the step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.config import DataConfig
from moetrain.data import Corpus, Loader, make_loader, prepare
from moetrain.data.sampler import permute
from moetrain.parallel.mesh import Mesh
from tests.tiny import tiny

GLOBAL_BATCH = 8
CONTEXT = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Forty documents of random letters, 10 to 49 long: several in a window, and no two windows alike."""
    letters = np.random.default_rng(0)
    root: Path = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        (root / f"{i:02d}.txt").write_text(letters.integers(33, 123, 10 + i).astype(np.uint8).tobytes().decode())
    data = DataConfig(
        source="text", path=str(root), tokenizer="byte", cache=str(root / "cache"), validation_fraction=0.2
    )
    return prepare(data, context=CONTEXT)


def loader(corpus: Corpus, world_size: int = 1, accumulation: int = 1, rank: int = 0, seed: int = 3) -> Loader:
    return Loader(
        corpus=corpus,
        context=CONTEXT,
        micro_batch=GLOBAL_BATCH // world_size // accumulation,
        accumulation=accumulation,
        rank=rank,
        world_size=world_size,
        seed=seed,
        mask_documents=True,
    )


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 5000), key=st.text(max_size=8))
def test_permutation_is_a_bijection(size, key):
    image = permute(np.arange(size, dtype=np.int64), size, key)
    assert np.array_equal(np.sort(image), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 255, 256, 257, 65535, 65536, 65537])
def test_permutation_is_a_bijection_about_powers_of_four(size):
    image = permute(np.arange(size, dtype=np.int64), size, "key")
    assert np.array_equal(np.sort(image), np.arange(size))


def test_permutation_of_a_huge_range_needs_no_memory_of_its_size():
    size = 10**15 + 7
    image = permute(np.arange(1000, dtype=np.int64), size, "key")
    assert len(np.unique(image)) == 1000
    assert image.min() >= 0
    assert size * 0.99 < image.max() < size


def test_permutation_mixes():
    """Neighbours part, and every place of origin is about equally likely at the front: chi-square over 16 bins."""
    size = 4096
    image = permute(np.arange(size, dtype=np.int64), size, "key")
    assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 0.06
    assert (np.abs(np.diff(image)) == 1).mean() < 0.005
    fronts = np.concatenate([permute(np.arange(64, dtype=np.int64), size, f"key {i}") for i in range(50)])
    counts = np.bincount(fronts * 16 // size, minlength=16)
    assert ((counts - 200.0) ** 2 / 200).sum() < 45  # 15 degrees of freedom: beyond it once in 10 000


def test_an_epoch_holds_every_window_once_and_the_next_is_another_order(corpus):
    one = loader(corpus)
    size = (corpus.num_train_tokens - 1) // CONTEXT
    stream = np.concatenate([one.train_windows(step, 0) for step in range(2 * size // GLOBAL_BATCH + 1)])
    first, second = stream[:size], stream[size : 2 * size]
    assert np.array_equal(np.sort(first), np.arange(size))
    assert np.array_equal(np.sort(second), np.arange(size))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first[:GLOBAL_BATCH], loader(corpus, seed=4).train_windows(0, 0))


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_samples_of_a_step_do_not_depend_on_the_layout(corpus, world_size, accumulation):
    if world_size * accumulation > GLOBAL_BATCH:
        accumulation = 1
    for step in (0, 1, 7, 40):  # step 7 and 40 lie beyond the first epoch
        expected = loader(corpus).train(step, 0)
        rows = [
            loader(corpus, world_size, accumulation, rank).train(step, micro)
            for micro in range(accumulation)
            for rank in range(world_size)
        ]
        assert torch.equal(torch.cat([row.tokens_BS for row in rows]), expected.tokens_BS)
        assert torch.equal(torch.cat([row.targets_BS for row in rows]), expected.targets_BS)


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (4, 2), (1, 4)])
def test_validation_windows_do_not_depend_on_the_layout_nor_on_the_seed(corpus, world_size, accumulation):
    expected = torch.cat([loader(corpus, seed=1).validation(i).tokens_BS for i in range(3)])
    rows = [
        loader(corpus, world_size, accumulation, rank).validation(index).tokens_BS
        for index in range(3 * accumulation)
        for rank in range(world_size)
    ]
    assert torch.equal(torch.cat(rows), expected)
    size = (len(corpus.validation.tokens) - 1) // CONTEXT
    assert len(torch.unique(expected, dim=0)) == min(size, 24)


def test_a_batch_is_what_the_bins_hold(corpus):
    one = loader(corpus)
    batch, windows = one.train(2, 0), one.train_windows(2, 0)
    tokens = np.fromfile(corpus.folder / "train.bin", dtype="<u2").astype(np.int64)
    for row, window in enumerate(windows):
        start = int(window) * CONTEXT
        assert batch.tokens_BS[row].tolist() == tokens[start : start + CONTEXT].tolist()
        assert batch.targets_BS[row].tolist() == tokens[start + 1 : start + CONTEXT + 1].tolist()
    assert batch.tokens_BS.dtype == batch.targets_BS.dtype == batch.document_BS.dtype == torch.int64
    assert batch.tokens_BS.is_contiguous()
    assert batch.targets_BS.is_contiguous()


def test_document_ids_change_after_each_end_of_document(corpus):
    """Brute force: the number of documents begun at or before a token is one more than the ends before it."""
    tokens = np.fromfile(corpus.folder / "train.bin", dtype="<u2").astype(np.int64)
    ends_before = np.concatenate([[0], np.cumsum(tokens == 256)[:-1]])
    one = loader(corpus)
    changes = 0
    for step in range(10):
        batch, windows = one.train(step, 0), one.train_windows(step, 0)
        for row, window in enumerate(windows):
            start = int(window) * CONTEXT
            assert batch.document_BS[row].tolist() == (ends_before[start : start + CONTEXT] + 1).tolist()
            changes += int((batch.document_BS[row].diff() != 0).sum())
    assert changes > 10


def test_no_document_ids_unless_asked_for(corpus):
    one = Loader(
        corpus=corpus, context=8, micro_batch=2, accumulation=1, rank=0, world_size=1, seed=0, mask_documents=False
    )
    assert one.train(0, 0).document_BS is None


def test_resume_by_number_alone(corpus):
    run = loader(corpus, accumulation=2)
    batches = [run.train(step, micro).tokens_BS for step in range(6) for micro in range(2)]
    again = loader(corpus, accumulation=2)
    assert torch.equal(again.train(5, 1).tokens_BS, batches[11])
    assert torch.equal(again.train(2, 0).tokens_BS, batches[4])


def test_a_config_and_a_mesh_say_all_of_it(corpus):
    """Eight samples a step over two ranks of two each: two micro-batches."""
    mesh = Mesh(rank=1, world_size=2, ep_size=2, device=torch.device("cpu"))
    made = make_loader(tiny(data__mask_documents=True), corpus, mesh)
    assert vars(made) == vars(loader(corpus, world_size=2, accumulation=2, rank=1, seed=7))
