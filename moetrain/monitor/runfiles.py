"""The files that a run appends to while it goes on. A line that can not be written costs that line, never the run."""

from __future__ import annotations

from moetrain.monitor.events import EventsFile
from moetrain.monitor.expert_load import ExpertLoadFile
from moetrain.monitor.jsonl import MetricsFile
from moetrain.monitor.lines import LineWriter
from moetrain.monitor.runfolder import RunFolder


class RunFiles:
    """metrics, loads and events, for rank 0 only."""

    def __init__(self, folder: RunFolder, start: int, tokens: int) -> None:
        """A new segment of each, after ``start`` steps and ``tokens`` tokens. Raises OSError if one can't be opened."""
        self._folder = folder
        self._lost: dict[str, int] = {}
        self._reason = ""
        self._told = False
        self._open(start, tokens)

    def _open(self, start: int, tokens: int) -> None:
        self.metrics = MetricsFile(self._folder.metrics, start, tokens)
        self.loads = ExpertLoadFile(self._folder.expert_load, start, tokens)
        self.events = EventsFile(self._folder.events, start)

    def reopen(self, start: int, tokens: int) -> None:
        """For a run that goes back to the end of step ``start``."""
        self.close()
        self._open(start, tokens)

    def close(self) -> None:
        """Once, or before ``reopen``."""
        for file in self._writers():
            file.close()
            self._lost[file.path.name] = self._lost.get(file.path.name, 0) + file.lost
            self._reason = file.failure or self._reason

    def alarm(self) -> str | None:
        """What to tell an operator, the first time that a line could not be written; then and before None."""
        failed = next((file for file in self._writers() if file.lost), None)
        if failed is None or self._told:
            return None
        self._told = True
        return f"{failed.path} can not be written: {failed.failure}. Training goes on; lines are lost until it can"

    def note(self) -> str | None:
        """How many lines were lost altogether, once the files are closed; None if none were."""
        lost = {name: number for name, number in self._lost.items() if number}
        if not lost:
            return None
        lines = ", ".join(f"{number} of {name}" for name, number in lost.items())
        return f"lines that could not be written ({self._reason}): {lines}"

    def _writers(self) -> tuple[LineWriter, ...]:
        return self.metrics.lines, self.loads.lines, self.events.lines
