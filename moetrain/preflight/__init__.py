"""Before the first step: everything about a world that can be found wrong without it."""

from moetrain.preflight.findings import Finding
from moetrain.preflight.world import check_host, examine, refuse, warnings

__all__ = ["Finding", "check_host", "examine", "refuse", "warnings"]
