"""Diagnoses: what is wrong with a router, by which numbers, and what to do. The same while training and afterwards.

A diagnosis looks at the last windows of a run and holds only if each of them shows it: one odd window says nothing.
Nothing is said of the first steps, in which no router is even. Thresholds are stated here and nowhere else;
recipes/doctor.md has how often they are right and wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from moetrain.monitor.signs import Array, Signs

NAMES = (
    "effective_experts",
    "dead_running",
    "load_max",
    "max_vio_running",
    "churn",
    "churn_two",
    "swing",
    "drop_fraction",
    "late_drop",
    "router_entropy",
    "logit_max",
    "rank_load_max",
    "aux_gradient_ratio",
)
COLLAPSED = 0.25  # of the way from the fewest experts that k choices can use to all of them
UNEVEN = 3.2  # times its share for the worst expert of a layer
BETTER = 0.95  # later over earlier half of the windows: less than this is getting better
OVERFLOW = (0.10, 0.30)  # of assignments dropped; likewise
LATE = 0.15  # more dropped in the last eighth of the sequence than in the first
HOT_FIRST = 1.8  # first layer's worst load over the median of the others
HOT_RANK, FAIR_EXPERT = 1.25, 1.6  # times their shares
UNDECIDED, FLAT, EVEN = 0.985, 0.6, 0.2  # router entropy, largest logit, MaxVio over ten windows
PULL = 3.0  # gradient of the router losses over that of the language loss
EXPLODING = 50.0
SWING = (0.7, 1.2)  # fair shares; the second excuses nothing, though it be getting better
CHURN, RETURN = 0.25, 0.5
TINY = 1e-9
LONGEST_WARMUP = 100  # steps: more of a warm-up excuses nothing


@dataclass(frozen=True)
class Diagnosis:
    """name: what is wrong. layer: None where it is the whole model. evidence and remedy: clauses."""

    name: str
    layer: int | None
    evidence: str
    remedy: str

    @property
    def title(self) -> str:
        return self.name if self.layer is None else f"{self.name} in layer {self.layer}"

    def __str__(self) -> str:
        return f"{self.title}: {self.evidence}. Remedy: {self.remedy}."


@dataclass(frozen=True)
class Rule:
    """finds: diagnoses of the windows it is shown, all of which must agree.

    windows, steps: how many windows at least, and how many steps they must reach over. grace: steps after the warm-up
    of which nothing is said.
    """

    finds: Callable[[Signs], Iterator[Diagnosis]]
    windows: int
    steps: int
    grace: int

    def of(self, signs: Signs, stop: int) -> list[Diagnosis]:
        """As after window number ``stop`` - 1."""
        start = start_of(signs, stop, self.windows, self.steps)
        return list(self.finds(signs.part(start, stop))) if self._may_speak(signs, start) else []

    def could_speak(self, signs: Signs) -> bool:
        """Whether there was a window by which it could have found something."""
        every = range(1, len(signs.steps_N) + 1)
        return any(self._may_speak(signs, start_of(signs, stop, self.windows, self.steps)) for stop in every)

    def _may_speak(self, signs: Signs, start: int) -> bool:
        excused = min(signs.facts.warmup_steps, LONGEST_WARMUP) + self.grace
        return start >= 0 and int(signs.steps_N[start]) > excused


def start_of(signs: Signs, stop: int, windows: int, steps: int) -> int:
    """The first of the windows that are looked at; negative if there are too few."""
    if stop < windows:
        return -1
    reach = int(np.searchsorted(signs.steps_N[:stop], signs.steps_N[stop - 1] - steps, side="right"))
    return min(stop - windows, reach)


def diagnose(signs: Signs, stop: int | None = None) -> list[Diagnosis]:
    """What is wrong after the last window, or after window number ``stop`` - 1."""
    stop = len(signs.steps_N) if stop is None else stop
    return [diagnosis for rule in RULES for diagnosis in rule.of(signs, stop)]


def collapse(signs: Signs) -> Iterator[Diagnosis]:
    """Few experts do the work of a layer."""
    facts, effective_NL, dead_NL = signs.facts, signs.at("effective_experts"), signs.at("dead_running")
    for row in _where(_collapsed(signs) & ~_rising(effective_NL)):
        evidence = f"{effective_NL[-1, row]:.1f} effective experts of {facts.num_experts}, and not rising"
        revival = ", and revive the experts that no token reaches (control=revive)" if dead_NL[-1, row] > 0 else ""
        yield Diagnosis("collapse", signs.layers[row], evidence, f"{facts.more_balance}{revival}")


def dead_experts(signs: Signs) -> Iterator[Diagnosis]:
    """Experts without a token in ten windows, or since a start, in a layer that is not collapsed altogether."""
    facts, dead_NL = signs.facts, signs.at("dead_running")
    for row in _where((dead_NL > 0).all(axis=0) & ~_collapsed(signs)):
        evidence = f"{int(dead_NL[:, row].min())} of {facts.num_experts} experts got no token in the last windows"
        remedy = f"{facts.more_balance}, or revive them (control=revive)"
        yield Diagnosis("dead experts", signs.layers[row], evidence, remedy)


def oscillation(signs: Signs) -> Iterator[Diagnosis]:
    """The load swings to and fro, from step to step or from window to window."""
    swing_NL, churn_NL, two_NL = signs.at("swing"), signs.at("churn"), signs.at("churn_two")
    by_step_L = _lasting(swing_NL, *SWING)
    by_window_L = ((churn_NL > CHURN) & (two_NL < RETURN * churn_NL)).all(axis=0)
    remedy = "lower router.bias_rate" if signs.facts.has_bias else "lower optim.lr or the router losses, or add warm-up"
    for row in _where(by_step_L | by_window_L):
        evidence = f"from step to step the load of an expert strays {swing_NL[-1, row]:.1f} fair shares from its mean"
        if not by_step_L[row]:
            evidence = f"{churn_NL[-1, row]:.0%} of the load moves away and back again from window to window"
        yield Diagnosis("oscillating load", signs.layers[row], evidence, remedy)


def overflow(signs: Signs) -> Iterator[Diagnosis]:
    """Much is dropped, and not less and less."""
    drop_N = signs.of("drop_fraction")
    if _lasting(drop_N, *OVERFLOW):
        evidence = f"{drop_N[-1]:.0%} of all assignments are dropped"
        remedy = "raise capacity.factor_train or choose capacity=dropless; an even load needs less of it"
        yield Diagnosis("capacity overflow", None, evidence, remedy)


def late_drops(signs: Signs) -> Iterator[Diagnosis]:
    """Who stands late in the sequence is dropped."""
    late_N = signs.of("late_drop")
    if (late_N > LATE).all():
        evidence = f"the last eighth of the sequence loses {late_N[-1]:.0%} more of its assignments than the first"
        remedy = "choose capacity.priority=probs or capacity=dropless"
        yield Diagnosis("late positions dropped", None, evidence, remedy)


def first_layer(signs: Signs) -> Iterator[Diagnosis]:
    """The first MoE layer alone is uneven: it sees little more than token identity."""
    load_NL = signs.at("load_max")
    if load_NL.shape[1] < 3 or _collapsed(signs)[0]:
        return
    hot_N, rest_N = load_NL[:, 0], np.median(load_NL[:, 1:], axis=1)
    if (hot_N > UNEVEN).all() and (hot_N > HOT_FIRST * rest_N).all() and not _later(hot_N) < BETTER:
        evidence = f"its worst expert has {hot_N[-1]:.1f}x its share, that of the layers after it {rest_N[-1]:.1f}x"
        remedy = "make it a dense layer (model.first_dense=1)"
        yield Diagnosis("first-layer hot spot", signs.layers[0], evidence, remedy)


def too_weak(signs: Signs) -> Iterator[Diagnosis]:
    """Uneven for long and not getting better, short of collapse, and not in the first layer alone."""
    if any(True for _ in first_layer(signs)):
        return
    load_NL = signs.at("load_max")
    uneven_L = (load_NL > UNEVEN).all(axis=0) & ~(_later(load_NL) < BETTER) & ~_collapsed(signs)
    if rows := _where(uneven_L):
        worst = max(rows, key=lambda row: load_NL[-1, row])
        evidence = f"the worst expert of layer {signs.layers[worst]} has {load_NL[-1, worst]:.1f}x its share"
        evidence += f", {len(rows)} of {len(signs.layers)} layers are like that, and it does not get better"
        yield Diagnosis("balance too weak", None, evidence, signs.facts.more_balance)


def too_strong(signs: Signs) -> Iterator[Diagnosis]:
    """The router learns to be even and little else: by its gradients where they are measured, else by its logits."""
    remedy = "lower the coefficient of the router losses (balance.balance_coef), which starve the language loss"
    pull_N = signs.of("aux_gradient_ratio")
    pull_N = pull_N[~np.isnan(pull_N)]
    if len(pull_N):
        if (pull_N > PULL).all():
            evidence = f"router losses pull {pull_N[-1]:.1f} times as hard at a router as the language loss"
            yield Diagnosis("balance too strong", None, evidence, remedy)
        return
    if signs.facts.balance_coef == 0:
        return
    entropy_N, vio_N = signs.of("router_entropy"), signs.of("max_vio_running")
    flat_N = np.median(signs.at("logit_max"), axis=1) < FLAT
    if flat_N.all() and (entropy_N > UNDECIDED).all() and (vio_N < EVEN).all():
        evidence = f"router entropy is {entropy_N[-1]:.3f} of its largest and the load even: no expert is preferred"
        yield Diagnosis("balance too strong", None, evidence, remedy)


def exploding(signs: Signs) -> Iterator[Diagnosis]:
    """Router logits grow without bound."""
    peak_NL = signs.at("logit_max")
    for row in _where((peak_NL > EXPLODING).all(axis=0) & _rising(peak_NL)):
        evidence = f"the largest router logit is {peak_NL[-1, row]:.0f}, and rising"
        remedy = "raise balance.z_coef (0.001 is usual) or lower optim.lr"
        yield Diagnosis("router logits exploding", signs.layers[row], evidence, remedy)


def hot_rank(signs: Signs) -> Iterator[Diagnosis]:
    """Experts look fair, and one rank has the heavier ones all the same."""
    if signs.facts.ep_size == 1:
        return
    rank_NL, load_NL = signs.at("rank_load_max"), signs.at("load_max")
    for row in _where(((rank_NL > HOT_RANK) & (load_NL < FAIR_EXPERT)).all(axis=0)):
        evidence = f"the busiest rank has {rank_NL[-1, row]:.2f}x its share, no expert more than"
        evidence += f" {load_NL[:, row].max():.2f}x, and every step waits for that rank"
        remedy = "even the load over devices (balance.device_coef=0.05)"
        yield Diagnosis("rank hot spot", signs.layers[row], evidence, remedy)


def _collapsed(signs: Signs) -> Any:
    """[L]; k choices of a token use k experts at least. Where these are all of them, rounding is no collapse."""
    facts = signs.facts
    fewest = min(max(facts.experts_per_token, 1.0), facts.num_experts)
    floor = fewest + COLLAPSED * (facts.num_experts - fewest)
    return np.asarray((signs.at("effective_experts") < floor - TINY).all(axis=0))


def _later(values_N: Array) -> Array:
    """The mean of the later half of the windows over that of the earlier one, of each column."""
    half = len(values_N) // 2
    earlier, later = values_N[:half].mean(axis=0), values_N[half:].mean(axis=0)
    return np.asarray(later / np.maximum(earlier, TINY))


def _lasting(values_N: Array, much: float, too_much: float) -> Any:
    """Whether all are over ``much`` and not getting better, or over ``too_much``; of each column."""
    over_much = (values_N > much).all(axis=0) & ~(_later(values_N) < BETTER)
    return over_much | (values_N > too_much).all(axis=0)


def _rising(values_N: Array) -> Any:
    return np.asarray(_later(values_N) > 1.05)


def _where(yes_L: Any) -> list[int]:
    return [int(row) for row in np.flatnonzero(yes_L)]


RULES = (
    Rule(collapse, windows=5, steps=40, grace=60),
    Rule(dead_experts, windows=5, steps=40, grace=60),
    Rule(oscillation, windows=10, steps=80, grace=80),
    Rule(overflow, windows=10, steps=80, grace=80),
    Rule(late_drops, windows=5, steps=40, grace=60),
    Rule(first_layer, windows=10, steps=80, grace=80),
    Rule(too_weak, windows=10, steps=80, grace=80),
    Rule(too_strong, windows=10, steps=80, grace=80),
    Rule(exploding, windows=5, steps=40, grace=60),
    Rule(hot_rank, windows=10, steps=80, grace=80),
)
MEMORY = (max(rule.windows for rule in RULES), max(rule.steps for rule in RULES))
