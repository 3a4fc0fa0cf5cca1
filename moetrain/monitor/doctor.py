"""Diagnoses: what is wrong with a router, by which numbers, and what to do. The same while training and afterwards.

A diagnosis looks at the last rows of metrics.jsonl and holds only if each of them shows it, so that one odd window
says nothing. Thresholds are stated here and nowhere else; recipes/doctor.md has how often they are right and wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Row = Mapping[str, float]
LAYER = re.compile(r"moe/layer_(\d+)/load_max")


@dataclass(frozen=True)
class Facts:
    """What a diagnosis must know of the run. balance_coef in our units; steered: the router evens its load itself."""

    num_experts: int
    experts_per_token: float
    balance_coef: float
    steered: bool
    dropless: bool
    ep_size: int


@dataclass(frozen=True)
class Diagnosis:
    """name: one of the names below. layer: None where it is the whole model. evidence and remedy: sentences."""

    name: str
    layer: int | None
    evidence: str
    remedy: str

    def __str__(self) -> str:
        where = "" if self.layer is None else f" in layer {self.layer}"
        return f"{self.name}{where}: {self.evidence}. {self.remedy}."


@dataclass(frozen=True)
class Signs:
    """The rows that a diagnosis judges by, oldest first, and the run they are of."""

    rows: Sequence[Row]
    facts: Facts

    def layers(self) -> list[int]:
        return sorted(int(found.group(1)) for key in self.rows[-1] if (found := LAYER.fullmatch(key)))

    def of(self, name: str, layer: int | None = None) -> np.ndarray:
        """The values of one number over the rows; NaN where a row has it not."""
        key = f"balance/{name}" if layer is None else f"moe/layer_{layer:02d}/{name}"
        return np.array([row.get(key, np.nan) for row in self.rows])


NUM_ROWS = 5
COLLAPSED = 0.35  # of the experts that could share the load evenly
OVERFLOW = 0.10  # of assignments dropped
LATE = 0.15  # more dropped in the last eighth of the sequence than in the first
UNEVEN = 1.0  # MaxVio over ten windows: one expert has twice its share
HOT_FIRST = 2.0  # first layer's worst load over the median of the others
HOT_RANK, FAIR_EXPERT = 1.25, 1.6
UNDECIDED, EVEN = 0.985, 0.15
EXPLODING = 60.0
SWING, RETURN = 0.20, 0.5


def diagnose(rows: Sequence[Row], facts: Facts) -> list[Diagnosis]:
    """What the last NUM_ROWS logged windows show; nothing before there are that many."""
    rows = [row for row in rows if "balance/load_max" in row][-NUM_ROWS:]
    if len(rows) < NUM_ROWS:
        return []
    signs = Signs(rows, facts)
    return [diagnosis for rule in RULES for diagnosis in rule(signs)]


def collapse(signs: Signs) -> Iterator[Diagnosis]:
    """Few experts do the work of a layer."""
    floor = COLLAPSED * signs.facts.num_experts
    for layer in signs.layers():
        effective = signs.of("effective_experts", layer)
        if (effective < floor).all() and effective[-1] <= effective[0] * 1.1:
            evidence = f"{effective[-1]:.1f} effective experts of {signs.facts.num_experts}, and not rising"
            yield Diagnosis("collapse", layer, evidence, _more_balance(signs.facts))


def dead_experts(signs: Signs) -> Iterator[Diagnosis]:
    """Experts without a token in ten windows, in a layer that is not collapsed altogether."""
    for layer in signs.layers():
        dead, effective = signs.of("dead_running", layer), signs.of("effective_experts", layer)
        if (dead > 0).all() and effective[-1] >= COLLAPSED * signs.facts.num_experts:
            evidence = f"{int(dead[-1])} of {signs.facts.num_experts} experts got no token in ten windows"
            remedy = f"{_more_balance(signs.facts)}, or revive them: control=revive"
            yield Diagnosis("dead experts", layer, evidence, remedy)


def oscillation(signs: Signs) -> Iterator[Diagnosis]:
    """The load swings to and fro from window to window."""
    for layer in signs.layers():
        churn, two = signs.of("churn", layer), signs.of("churn_two", layer)
        if (churn > SWING).all() and (two < RETURN * churn).all():
            evidence = f"{churn[-1]:.0%} of the load moves away and back again from window to window"
            remedy = "lower router.bias_rate where there is a bias, else optim.lr or balance.balance_coef"
            yield Diagnosis("oscillating load", layer, evidence, remedy)


def overflow(signs: Signs) -> Iterator[Diagnosis]:
    """Much is dropped."""
    drop = signs.of("drop_fraction")
    if (drop > OVERFLOW).all():
        evidence = f"{drop[-1]:.0%} of all assignments are dropped"
        remedy = "raise capacity.factor_train or choose capacity=dropless; an even load needs less of it"
        yield Diagnosis("capacity overflow", None, evidence, remedy)


def late_drops(signs: Signs) -> Iterator[Diagnosis]:
    """Who stands late in the sequence is dropped."""
    late = signs.of("late_drop")
    if (late > LATE).all():
        evidence = f"the last eighth of the sequence is dropped {late[-1]:.0%} more often than the first"
        remedy = "choose capacity.priority=probs, or capacity=dropless"
        yield Diagnosis("late positions dropped", None, evidence, remedy)


def first_layer(signs: Signs) -> Iterator[Diagnosis]:
    """The first MoE layer alone is uneven: it sees little more than token identity."""
    first, *others = signs.layers()
    if len(others) < 2:
        return
    hot = signs.of("max_vio_running", first)
    rest = np.median([signs.of("max_vio_running", layer) for layer in others], axis=0)
    if (hot > UNEVEN).all() and (hot + 1 > HOT_FIRST * (rest + 1)).all():
        evidence = (
            f"its worst expert has {hot[-1] + 1:.1f}x its share, {rest[-1] + 1:.1f}x in the median layer after it"
        )
        yield Diagnosis("first-layer hot spot", first, evidence, "make it a dense layer: model.first_dense=1")


def too_weak(signs: Signs) -> Iterator[Diagnosis]:
    """Uneven for long, short of collapse."""
    worst = signs.of("max_vio_running")
    effective = signs.of("effective_experts_min")
    if (worst > UNEVEN).all() and worst[-1] > 0.8 * worst[0] and effective[-1] >= COLLAPSED * signs.facts.num_experts:
        evidence = f"over ten windows the worst expert has {worst[-1] + 1:.1f}x its share, and it does not get better"
        yield Diagnosis("balance too weak", None, evidence, _more_balance(signs.facts))


def too_strong(signs: Signs) -> Iterator[Diagnosis]:
    """The load is even because the router prefers nothing."""
    if signs.facts.balance_coef == 0:
        return
    entropy, vio = signs.of("router_entropy"), signs.of("max_vio_running")
    if (entropy > UNDECIDED).all() and (vio < EVEN).all():
        evidence = f"router entropy is {entropy[-1]:.3f} of its largest, so every expert is as good as any other"
        remedy = f"lower balance.balance_coef (now {signs.facts.balance_coef:g}), which starves the language loss"
        yield Diagnosis("balance too strong", None, evidence, remedy)


def exploding(signs: Signs) -> Iterator[Diagnosis]:
    """Router logits grow without bound."""
    for layer in signs.layers():
        peak = signs.of("logit_max", layer)
        if (peak > EXPLODING).all() and peak[-1] >= peak[0]:
            evidence = f"the largest router logit is {peak[-1]:.0f}, and rising"
            remedy = "raise balance.z_coef (0.001 is usual), or lower optim.lr"
            yield Diagnosis("router logits exploding", layer, evidence, remedy)


def hot_rank(signs: Signs) -> Iterator[Diagnosis]:
    """Experts look fair, and one rank has the heavier ones all the same."""
    if signs.facts.ep_size == 1:
        return
    for layer in signs.layers():
        rank, expert = signs.of("rank_load_max", layer), signs.of("load_max", layer)
        if (rank > HOT_RANK).all() and (expert < FAIR_EXPERT).all():
            evidence = (
                f"the busiest rank has {rank[-1]:.2f}x its share while no expert has more than {expert.max():.2f}x"
            )
            remedy = "every step waits for it: even the load over devices with balance.device_coef"
            yield Diagnosis("rank hot spot", layer, evidence, remedy)


RULES: tuple[Callable[[Signs], Iterator[Diagnosis]], ...] = (
    collapse,
    dead_experts,
    oscillation,
    overflow,
    late_drops,
    first_layer,
    too_weak,
    too_strong,
    exploding,
    hot_rank,
)


def _more_balance(facts: Facts) -> str:
    if facts.steered:
        return "raise router.bias_rate"
    if facts.balance_coef == 0:
        return "switch a balance loss on: balance.balance_coef=0.01"
    return f"raise balance.balance_coef (now {facts.balance_coef:g})"
