"""Requests to leave: a signal to any rank, or a file in the run folder."""

from __future__ import annotations

from pathlib import Path


class Leave:
    """Whether this rank was asked to leave after the step at hand."""

    def __init__(self, stop_file: Path, is_main: bool) -> None:
        self._stop_file, self._is_main = stop_file, is_main

    @property
    def asked(self) -> bool:
        return self._is_main and self._stop_file.exists()
