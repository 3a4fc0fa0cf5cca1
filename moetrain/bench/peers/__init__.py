"""MoE layers of other libraries, with given weights, as contestants: one file each. What is not installed is named, not
skipped over.
"""

from __future__ import annotations

import importlib.util

from moetrain.bench.peers import deepspeed, hugging_face, tutel
from moetrain.bench.peers.case import LayerCase
from moetrain.bench.race import Contestant

PEERS = (
    ("transformers", hugging_face.contestants, "pip install 'moetrain[bench]'"),
    ("deepspeed", deepspeed.contestants, "pip install deepspeed"),
    ("tutel", tutel.contestants, "it is built from source: recipes/benchmarks.md"),
)


def peers(case: LayerCase) -> tuple[list[Contestant], list[str]]:
    """Those that can be had, and why the others can not."""
    found: list[Contestant] = []
    missing: list[str] = []
    for package, contestants, how in PEERS:
        if importlib.util.find_spec(package) is None:
            missing.append(f"{package} is not installed ({how})")
        else:
            found += contestants(case)
    return found, missing
