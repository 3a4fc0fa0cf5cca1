"""``python -m moetrain`` and ``torchrun -m moetrain``: the same as ``moetrain``."""

from __future__ import annotations

import os
import sys

from moetrain.cli import main

code = main()
sys.stdout.flush()
sys.stderr.flush()
# Everything is written and closed. Threads of native libraries are not: once in some thirty runs one of them aborted
# while the interpreter was taken down, and torchrun called a finished run a failed one.
os._exit(code)
