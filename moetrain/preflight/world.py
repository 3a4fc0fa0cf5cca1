"""All checks of a world, before its first step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from moetrain.config import Config
from moetrain.data import Corpus
from moetrain.monitor.origin import Origin
from moetrain.monitor.runfolder import RunFolder, known_id
from moetrain.parallel.mesh import Mesh, choose_device
from moetrain.plan import make_plan
from moetrain.preflight.exchange import check_groups
from moetrain.preflight.findings import Finding, judged
from moetrain.preflight.memory import check_memory
from moetrain.preflight.network import Place, judge_places, place
from moetrain.preflight.same import check_clocks, check_same
from moetrain.preflight.storage import check_room, check_shared, size_of
from moetrain.types import ConfigError


def check_host(config: Config) -> None:
    """What would keep this host's ranks from meeting the others, before they try. Raises ConfigError."""
    refuse([judge_places([place(choose_device(config.machine).type)])])


def examine(config: Config, mesh: Mesh, corpus: Corpus, origin: Origin) -> tuple[Finding, ...]:
    """Every check, in the order in which they build on each other; the same on every rank. Collective."""
    found = check_same(config, origin, corpus, mesh)
    found.append(judged("network", lambda: place(mesh.device.type), Place, judge_places, mesh))
    found += check_groups(mesh)
    root = Path(config.run.root)
    found.append(check_shared(root, mesh))
    plan = make_plan(config, mesh.world_size)
    known = known_id(config, origin)
    held = 0 if known is None else size_of(RunFolder(root / known).checkpoints)
    found.append(check_room(config, root, plan.size.total, held, mesh))
    found.append(check_memory(max(plan.state_bytes, plan.start_bytes), mesh))
    found.append(check_clocks(mesh))
    return tuple(found)


def refuse(findings: Sequence[Finding]) -> None:
    """Raises ConfigError with all that is fatal."""
    if problems := [one.problem() for one in findings if one.fatal and not one.ok]:
        raise ConfigError(problems)


def warnings(findings: Sequence[Finding]) -> list[str]:
    """What is wrong and does not keep a run from starting."""
    return [f"{one.check}: {one.detail}; {one.fix}" for one in findings if not one.ok and not one.fatal]


def table(findings: Sequence[Finding], seconds: float) -> Table:
    drawn = Table("check", "", "what was found", title=f"Preflight, {seconds:.1f} s", title_justify="left", box=None)
    for one in findings:
        style, word = ("green", "ok") if one.ok else ("red", "FAILED") if one.fatal else ("yellow", "warning")
        drawn.add_row(one.check, f"[{style}]{word}[/]", one.detail if one.ok else f"{one.detail}\nfix: {one.fix}")
    return drawn
