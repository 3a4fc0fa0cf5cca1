"""One process at a time, over all ranks and nodes that see the same folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moetrain.data.errors import refusal


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``, waiting for whoever holds it. The kernel frees it when its holder dies.

    The file itself stays: removing it would let two processes hold locks on two files of one name.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except (OSError, ValueError) as error:
        reason = f"cannot be written ({error})"
        raise refusal("data.cache", str(path.parent), reason, "give a folder that every rank may write") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
