"""The same benchmark with malloc as it comes and with the setting of the launch scripts (``launch/environment.sh``).

glibc reads it when a process starts, so each runs in a process of its own.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from typing import Literal

from moetrain.types import ConfigError, Problem

Allocator = Literal["given", "tuned", "both"]
ALLOCATORS: tuple[Allocator, ...] = ("given", "tuned", "both")
VARIABLE = "GLIBC_TUNABLES"
TUNED = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=2147483647"


def name_of_allocator() -> str:
    """As this process has it: ``as it comes``, ``tuned`` or the value that the user gave it."""
    value = os.environ.get(VARIABLE)
    return "as it comes" if value is None else "tuned" if value == TUNED else value


def in_turn(allocator: Allocator, command: Sequence[str]) -> int:
    """``moetrain`` with ``command``, as it comes (for ``both``) and then tuned; the first exit code that isn't 0, or 0.

    Raises ConfigError where malloc is not glibc's.
    """
    if platform.libc_ver()[0] != "glibc":
        reason = "needs glibc, whose setting it is"
        raise ConfigError([Problem("--allocator", allocator, reason, "leave it out")])
    plain = {name: value for name, value in os.environ.items() if name != VARIABLE}
    for environment in ([plain] if allocator == "both" else []) + [plain | {VARIABLE: TUNED}]:
        code = subprocess.run([sys.executable, "-m", "moetrain", *command], env=environment, check=False).returncode
        if code != 0:
            return code
    return 0
