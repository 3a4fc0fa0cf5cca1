"""How often something that is too large for every logged step is recorded."""

from __future__ import annotations


def is_spread_step(step: int, steps: int, log_every: int, most: int) -> bool:
    """Whether this logged step is one of at most ``most`` that are evenly spread over a run of ``steps`` steps.

    A pure function of the step, so that a resumed run keeps the rhythm.
    """
    num_logs = -(-steps // log_every)
    every = -(-num_logs // most)
    return step % log_every == 0 and (step // log_every) % every == 0
