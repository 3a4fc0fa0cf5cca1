"""How often the doctor is right: planted faults that are named, and healthy runs of which nothing is said.

``python -m tests.doctor_rates [--seeds 3] [--runs FOLDER ...] [--write recipes/doctor.md]`` trains every planted case
and every healthy router with each seed (minutes on one core), looks at the run folders that are named as well, and
prints tables, or writes them below the marker line of a file.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import torch

from moetrain.monitor.doctor import NAMES
from moetrain.monitor.history import read_history
from moetrain.monitor.rounds import Finding, examine, findings
from moetrain.monitor.signs import facts_of, signs_of
from tests.planted import Case, config_of, train
from tests.planted_cases import FAULTS, ROUTERS, healthy

MARKER = "<!-- What follows is written by python -m tests.doctor_rates -->"
HEALTHY_STEPS, HEALTHY_EVERY = 300, 10
Named = list[tuple[str, list[Finding]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="folders of run folders, all held healthy")
    parser.add_argument("--write", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    text = "\n".join([MARKER, "", *tables(asked.seeds, asked.runs)])
    if asked.write is None:
        print(text)
    else:
        asked.write.write_text(asked.write.read_text().partition(MARKER)[0] + text)


def tables(seeds: int, folders: Sequence[Path]) -> Iterator[str]:
    yield from _faults(seeds)
    runs: Named = []
    for name in ROUTERS:
        case = healthy(name)
        made = [_findings(case, seed, HEALTHY_STEPS, HEALTHY_EVERY) for seed in range(seeds)]
        runs += [(f"{name}, seed {seed}", found) for seed, found in enumerate(made)]
    yield from _healthy(f"Small models of {HEALTHY_STEPS} steps", runs)
    for folder in folders:
        read = [read_history(record.parent) for record in sorted(folder.glob("*/run.json"))]
        over = [(one.facts.id, examine(one)) for one in read if one.is_over]
        yield from _healthy(f"The runs of `{folder.name}`", over)


def _faults(seeds: int) -> Iterator[str]:
    yield "| planted | diagnosis | named | first at step (median) | said besides |"
    yield "|---|---|---|---|---|"
    num_named = 0
    for case in FAULTS:
        runs = [_findings(case, seed, 192, 8) for seed in range(seeds)]
        first = [min((one.first_step for one in run if one.diagnosis.name == case.expected), default=0) for run in runs]
        named = [step for step in first if step]
        num_named += len(named)
        others = sorted({one.diagnosis.name for run in runs for one in run} - {case.expected})
        step = f"{median(named):g}" if named else ""
        yield f"| {case.name} | {case.expected} | {len(named)} of {seeds} | {step} | {', '.join(others)} |"
    yield ""
    yield f"Named: {num_named} of {len(FAULTS) * seeds} planted faults."
    yield ""


def _healthy(title: str, runs: Named) -> Iterator[str]:
    loud = [(name, found) for name, found in runs if found]
    yield f"{title}: nothing is said of {len(runs) - len(loud)} of {len(runs)}."
    yield ""
    if loud:
        yield "| run | diagnosis | steps | evidence |"
        yield "|---|---|---|---|"
        for name, found in loud:
            for one in found:
                steps = f"{one.first_step} to {'the end' if one.at_end else one.last_step}"
                yield f"| {name} | {one.diagnosis.title} | {steps} | {one.diagnosis.evidence} |"
        yield ""


def _findings(case: Case, seed: int, steps: int, every: int) -> list[Finding]:
    config = config_of(case, seed, steps, every)
    return findings(signs_of(list(train(case, config)), NAMES, facts_of(config, case.ep_size)))


if __name__ == "__main__":
    main()
