"""``python -m moetrain`` and ``torchrun -m moetrain``: the same as ``moetrain``."""

from __future__ import annotations

import sys

from moetrain.cli import main

sys.exit(main())
