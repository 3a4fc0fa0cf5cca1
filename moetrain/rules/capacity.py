"""Rules of a limit per expert: keys that have no part where there is none."""

from __future__ import annotations

from moetrain.types import Problem

NOTHING_DROPPED = "has no part where nothing is dropped: capacity.factor_train and factor_eval are null"


def slots_under_a_limit(factor: float | None, slots: int | None, *, when: str) -> Problem | None:
    if slots is None or factor is not None:
        return None
    reason = f"capacity.factor_{when} = null is dropless, so there are no slots to count"
    return Problem(f"capacity.slots_{when}", slots, reason, f"set capacity.factor_{when}=1.0, say: slots go before it")


def priority_under_a_limit(factor_train: float | None, factor_eval: float | None, priority: str) -> Problem | None:
    if factor_train is not None or factor_eval is not None or priority == "choice_major":
        return None
    fix = "set capacity.priority=choice_major, its default, or capacity.factor_train=1.25, say"
    return Problem("capacity.priority", priority, NOTHING_DROPPED, fix)


def renormalised_under_a_limit(
    factor_train: float | None, factor_eval: float | None, renormalise: bool
) -> Problem | None:
    if factor_train is not None or factor_eval is not None or not renormalise:
        return None
    fix = "set capacity.renormalise=false, or capacity.factor_train=1.25, say"
    return Problem("capacity.renormalise", renormalise, NOTHING_DROPPED, fix)
