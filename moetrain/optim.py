"""The learning rate as a pure function of the step. The optimiser itself is built by the engine."""

from __future__ import annotations

import math

from moetrain.config import OptimConfig


def lr_at(step: int, steps: int, optim: OptimConfig) -> float:
    """The learning rate of update ``step`` (0 is the first) in a run of ``steps`` updates.

    With W = ``warmup_steps``, N = ``steps``, r = ``min_lr_ratio``:

    - warm-up, step < W: ``lr * (step + 1) / W``, so that the first update is not lost and update W - 1 has the full lr;
    - cosine: ``lr * (r + (1 - r) * (1 + cos(pi t)) / 2)``, t from 0 at update W to 1 at update N - 1;
    - wsd: ``lr`` until the last D = max(1, round(decay_fraction * N)) updates, in which it falls linearly,
      ``lr * (1 - (1 - r) t)``, t from 1/D to 1 at update N - 1;
    - constant: ``lr``.

    Warm-up comes first where it reaches into a decay. Updates after N - 1 keep the final value.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    floor = optim.min_lr_ratio
    if optim.schedule == "cosine":
        span = max(1, steps - 1 - optim.warmup_steps)
        t = min(1.0, (step - optim.warmup_steps) / span)
        return optim.lr * (floor + (1 - floor) * (1 + math.cos(math.pi * t)) / 2)
    if optim.schedule == "wsd":
        num_decaying = max(1, round(optim.decay_fraction * steps))
        t = min(1.0, max(0, step + 1 - (steps - num_decaying)) / num_decaying)
        return optim.lr * (1 - (1 - floor) * t)
    return optim.lr
