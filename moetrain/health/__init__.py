"""What keeps a run alive: bad steps are skipped or undone, requests to leave are heard by all ranks."""

from moetrain.health.guard import BadStep, Guard
from moetrain.health.leave import Leave
from moetrain.health.rollback import Rollbacks, Unstable

__all__ = ["BadStep", "Guard", "Leave", "Rollbacks", "Unstable"]
