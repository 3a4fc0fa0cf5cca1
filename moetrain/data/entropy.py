"""How well counting alone predicts a token stream: the marks that a trained model has to pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ENTROPY_TOKENS = 2**26
CHUNK = 2**21


@dataclass(frozen=True)
class Entropies:
    """In nats per token, in-sample: what a table of counts of the same tokens would reach on them.

    unigram: H(x_t). bigram: H(x_t | x_{t-1}). num_tokens: over how many tokens they were counted.
    """

    unigram: float
    bigram: float
    num_tokens: int


def entropies(tokens: NDArray[np.unsignedinteger], vocab_size: int) -> Entropies:
    """Exact empirical entropies of the first ``ENTROPY_TOKENS`` tokens of a stream, end-of-document tokens included.

    The stream is closed to a ring (the first token follows the last), so that both tokens of a pair have the same
    distribution and bigram <= unigram always holds. Memory: 16 bytes per distinct pair, and a chunk.
    """
    tokens = tokens[:ENTROPY_TOKENS]
    assert len(tokens) > 0, "entropy of an empty stream"
    counts = np.zeros(vocab_size, dtype=np.int64)
    pairs, pair_counts = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    for start in range(0, len(tokens), CHUNK):
        here = tokens[start : start + CHUNK].astype(np.int64)
        end = start + len(here)
        following = np.append(here[1:], np.int64(tokens[end % len(tokens)]))
        counts += np.bincount(here, minlength=vocab_size)
        pairs, pair_counts = _merge(pairs, pair_counts, *np.unique(here * vocab_size + following, return_counts=True))
    unigram = _entropy(counts[counts > 0])
    # H(x_t | x_{t-1}) = H(x_{t-1}, x_t) - H(x_{t-1}); rounding must not make it negative or greater than H(x_t).
    bigram = min(max(_entropy(pair_counts) - unigram, 0.0), unigram)
    return Entropies(unigram, bigram, len(tokens))


def _merge(
    keys: NDArray[np.int64], counts: NDArray[np.int64], more_keys: NDArray[np.int64], more_counts: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Two sorted tables of counts as one."""
    keys, counts = np.concatenate([keys, more_keys]), np.concatenate([counts, more_counts])
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    first = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
    return keys[first], np.add.reduceat(counts, first)


def _entropy(counts: NDArray[np.int64]) -> float:
    total = counts.sum()
    return float((counts * np.log(total / counts)).sum() / total)
