"""What was measured, kept in the package: readable without transformers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from moetrain.parity.block import transformers_version
from moetrain.parity.case import Measured

RECORD = Path(__file__).parent / "measured.json"


@dataclass(frozen=True)
class Record:
    """One measurement of all cases, and the versions that it was made with."""

    torch: str
    transformers: str
    cases: tuple[Measured, ...]


def write_record(measured: list[Measured], path: Path = RECORD) -> None:
    """Replace the record, one case a line. Errors are rounded to two digits."""
    lines = ",\n".join(f"    {json.dumps(_rounded(case))}" for case in measured)
    versions = f'  "torch": "{torch.__version__}",\n  "transformers": "{transformers_version()}",\n'
    path.write_text(f'{{\n{versions}  "cases": [\n{lines}\n  ]\n}}\n', encoding="utf-8")


def read_record(path: Path = RECORD) -> Record:
    raw = json.loads(path.read_text(encoding="utf-8"))
    return Record(raw["torch"], raw["transformers"], tuple(Measured(**case) for case in raw["cases"]))


def _rounded(measured: Measured) -> dict[str, object]:
    return {
        key: float(f"{value:.2g}") if isinstance(value, float) else value for key, value in asdict(measured).items()
    }
