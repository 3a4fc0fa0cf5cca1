"""What a layer counts in training: each micro-batch once, however often its forward runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Counted(Generic[T]):
    """A sum over micro-batches, of what a subclass assigns to ``_latest`` when it records one.

    Activation recompute runs forward twice per micro-batch: a counter that forward incremented would double. So forward
    only assigns what this micro-batch saw, and ``commit``, called once after the micro-batch, adds it up.
    """

    def __init__(self, plus: Callable[[T, T], T], nothing: T | None = None) -> None:
        """nothing: the sum of no micro-batch; without it there is nothing to take before a commit."""
        self._plus, self._nothing, self._pending = plus, nothing, nothing
        self._latest: T | None = None

    def commit(self) -> None:
        """Add the latest micro-batch, once."""
        assert self._latest is not None, "commit() without a training forward since the last commit()"
        self._pending = self._latest if self._pending is None else self._plus(self._pending, self._latest)
        self._latest = None

    def take(self) -> T:
        """The sum since the last take; starts anew."""
        assert self._pending is not None, "take() before any commit()"
        taken, self._pending = self._pending, self._nothing
        return taken
