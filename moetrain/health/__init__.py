"""What keeps a run alive: bad steps are skipped or undone, requests to leave are heard by all ranks, hangs
end with a report, and so do replicas that differ.
"""

from moetrain.health.flight import record_collectives
from moetrain.health.guard import BadStep, Guard
from moetrain.health.leave import Leave, Left
from moetrain.health.orphan import die_with_torchrun
from moetrain.health.replicas import Replicas
from moetrain.health.rollback import Rollbacks, Unstable
from moetrain.health.watchdog import Watchdog

__all__ = [
    "BadStep",
    "Guard",
    "Leave",
    "Left",
    "Replicas",
    "Rollbacks",
    "Unstable",
    "Watchdog",
    "die_with_torchrun",
    "record_collectives",
]
