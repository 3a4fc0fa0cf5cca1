"""What all sections have in common."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Part = dict[str, Any]
