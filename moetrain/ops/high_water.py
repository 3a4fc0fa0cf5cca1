"""How many bytes of tensors are alive at once, counted operation by operation, on any device, meta included."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HighWater(TorchDispatchMode):
    """Within it, what operations on ``device_type`` give counts from its making until nothing refers to it.

    now, most: bytes alive, and the most there were. What kernels use inside of themselves is not seen, nor what was
    made before.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.now = self.most = 0
        self._device_type = device_type
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in self._storages((args, kwargs))}
        for storage in self._storages(out):
            if storage._cdata not in given:
                self._count(storage)
        return out

    def _storages(self, tree: Any) -> list[torch.UntypedStorage]:
        tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
        return [tensor.untyped_storage() for tensor in tensors if tensor.device.type == self._device_type]

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size
