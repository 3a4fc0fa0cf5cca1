"""Where a run comes from: versions, source, machine, command line. Nothing secret."""

from __future__ import annotations

import os
import platform
import re
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from moetrain.redaction import redact, redact_source

PACKAGES = ("moetrain", "torch", "deepspeed", "hydra-core", "wandb", "datasets", "numpy")
DECISIVE = ("*.py", "conf", "recipes")
"""What of a checkout decides what a run computes. What else is not committed, notes and keys, is nobody's business."""
SECRET = re.compile(r"(?i)(\S*(?:key|token|secret|password|passwd|credential)[a-z_]*=)(.+)")


@dataclass(frozen=True)
class Origin:
    """Facts about one start. ``launch_id``: torchrun's id of this launch, None if the user gave none and it made up
    none.

    commit, dirty: of the git checkout that moetrain was imported from; None for an installed package. diff: what is not
    committed of its source and configs, as a patch; what looks like a key in it is left out.
    """

    host: str
    world_size: int
    command: list[str]
    launch_id: str | None
    versions: dict[str, str]
    commit: str | None
    dirty: bool | None
    diff: str

    def facts(self) -> dict[str, object]:
        """What goes into run.json: everything but the patch, which is a file of its own."""
        return {name: value for name, value in asdict(self).items() if name != "diff"}


def origin(world_size: int) -> Origin:
    """Look at this process and the source that it runs. The environment is not recorded: it holds keys."""
    source = Path(__file__).resolve().parents[2]
    commit = _git(source, "rev-parse", "HEAD").strip() if _is_checkout(source) else None
    launch_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return Origin(
        host=socket.gethostname(),
        world_size=world_size,
        command=[SECRET.sub(r"\1***", redact(word)) for word in sys.argv],
        launch_id=None if launch_id == "none" else launch_id,
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        commit=commit,
        dirty=None if commit is None else bool(_git(source, "status", "--porcelain")),
        diff="" if commit is None else redact_source(_git(source, "diff", "HEAD", "--", *DECISIVE)),
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _is_checkout(source: Path) -> bool:
    """Whether this is moetrain's own repository, and not one that an environment happens to lie in."""
    top = _git(source, "rev-parse", "--show-toplevel").strip()
    return bool(top) and Path(top).resolve() == source


def _git(folder: Path, *words: str) -> str:
    """The output of a git command, empty if it fails or there is no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
