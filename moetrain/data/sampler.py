"""Which tokens a rank sees at a step: a pure function of the step, so that a run has no data position to save."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from moetrain.config import Config
from moetrain.data.bins import Corpus, TokenStream
from moetrain.parallel.mesh import Mesh
from moetrain.types import Batch

ROUNDS = 8


def permute(index: NDArray[np.int64], size: int, key: str) -> NDArray[np.int64]:
    """Where each index in [0, size) goes under the permutation of [0, size) that ``key`` names.

    A Feistel network on the next power of four, walked along its cycle until it lands inside [0, size): Black and
    Rogaway, "Ciphers with Arbitrary Finite Domains", 2002. O(1) memory; at most about four evaluations an index.
    """
    assert ((index >= 0) & (index < size)).all(), "index outside the permutation"
    half = max(((size - 1).bit_length() + 1) // 2, 1)
    keys = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest(), dtype="<u8")
    out = _feistel(index.astype(np.uint64), half, keys)
    while (outside := np.flatnonzero(out >= size)).size:
        out[outside] = _feistel(out[outside], half, keys)
    return out.astype(np.int64)


def _feistel(x: NDArray[np.uint64], half: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of [0, 4**half)."""
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = x >> shift, x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << shift) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every bit of x reaches every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True, kw_only=True, eq=False)
class Loader:
    """Batches of one rank. Sample n of the run is a window of ``context + 1`` tokens; windows overlap by one token.

    Micro-batch ``micro`` of step ``step`` holds, over all ranks in order of rank, the samples from
    ``(step * accumulation + micro) * micro_batch * world_size`` on: a step sees the same samples at every world size
    and accumulation that give the same global batch. Each epoch is a permutation of its own, of all windows.
    """

    corpus: Corpus
    context: int
    micro_batch: int
    accumulation: int
    rank: int
    world_size: int
    seed: int
    mask_documents: bool

    def train(self, step: int, micro: int) -> Batch:
        """Micro-batch ``micro`` (0 <= micro < accumulation) of step ``step`` (from 0). CPU, int64, [B, S]."""
        return self._batch(self.corpus.train, self.train_windows(step, micro))

    def train_windows(self, step: int, micro: int) -> NDArray[np.int64]:
        """[B] numbers of the windows that ``train(step, micro)`` holds; window w starts at token w * context."""
        assert 0 <= micro < self.accumulation, "micro counts within a step"
        samples = self._samples(step * self.accumulation + micro)
        size = self._num_windows(self.corpus.train)
        epochs = samples // size
        windows = np.empty_like(samples)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            windows[here] = permute(samples[here] % size, size, f"train {self.seed} {epoch}")
        return windows

    def validation(self, index: int) -> Batch:
        """Validation micro-batch ``index`` (from 0): the same windows in every run whatever its seed, at random places.

        ``index`` counts as ``step * accumulation + micro`` does in training, so that the first n global batches hold
        the same windows at every world size. Past the last window it begins again with the first.
        """
        size = self._num_windows(self.corpus.validation)
        return self._batch(self.corpus.validation, permute(self._samples(index) % size, size, "validation"))

    def _samples(self, index: int) -> NDArray[np.int64]:
        """[B] global sample numbers of this rank in the run's ``index``-th micro-batch."""
        first = (index * self.world_size + self.rank) * self.micro_batch
        return np.arange(first, first + self.micro_batch, dtype=np.int64)

    def _num_windows(self, stream: TokenStream) -> int:
        size = (len(stream.tokens) - 1) // self.context
        assert size > 0, "prepare() refuses a corpus shorter than a sample of this context"
        return size

    def _batch(self, stream: TokenStream, windows: NDArray[np.int64]) -> Batch:
        starts = windows * self.context
        rows = np.stack([stream.tokens[start : start + self.context + 1] for start in starts])
        if (greatest := int(rows.max())) >= self.corpus.vocab_size:
            where = f"in windows {windows.tolist()} of {self.context} tokens"
            raise ValueError(f"{self.corpus.folder} is damaged: id {greatest} {where}, of {self.corpus.vocab_size} ids")
        tokens = torch.from_numpy(rows.astype(np.int64))
        document_BS = domain_BS = None
        if self.mask_documents or stream.domains is not None:
            document = self._documents(stream, starts)
            document_BS = torch.from_numpy(document) if self.mask_documents else None
            if stream.domains is not None:
                domain_BS = torch.from_numpy(stream.domains[document - 1].astype(np.int64))
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), document_BS, domain_BS)

    def _documents(self, stream: TokenStream, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """[B, S] number of the document of each input token, from 1: how many documents start at or before it."""
        rows = []
        for start in starts:
            low, high = np.searchsorted(stream.starts, (start, start + self.context), side="right")
            inside = stream.starts[low:high]
            rows.append(low + np.searchsorted(inside, np.arange(start, start + self.context), side="right"))
        return cast(NDArray[np.int64], np.stack(rows).astype(np.int64))


def make_loader(config: Config, corpus: Corpus, mesh: Mesh) -> Loader:
    """That of this rank in a run of ``config``, whose global batch is a whole number of micro-batches of all ranks."""
    train = config.train
    return Loader(
        corpus=corpus,
        context=config.model.context,
        micro_batch=train.micro_batch,
        accumulation=train.global_batch // (mesh.world_size * train.micro_batch),
        rank=mesh.rank,
        world_size=mesh.world_size,
        seed=config.run.seed,
        mask_documents=config.data.mask_documents,
    )
