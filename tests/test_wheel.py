"""An installed wheel carries conf/ and recipes/ and runs from an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*command: str, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_installed_wheel_runs_in_an_empty_folder(tmp_path: Path) -> None:
    dist, site, empty = tmp_path / "dist", tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist), str(ROOT), folder=empty)
    (wheel,) = dist.glob("*.whl")
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", "--target", str(site))
    run(*pip, str(wheel), folder=empty)
    where = run("-c", "import moetrain; print(moetrain.__file__)", folder=empty, PYTHONPATH=str(site))
    assert Path(where.strip()).is_relative_to(site)
    shipped = {str(path.relative_to(site / "moetrain" / "conf")) for path in (site / "moetrain").rglob("*.yaml")}
    checkout = {str(path.relative_to(ROOT / "conf")) for path in (ROOT / "conf").glob("*/*.yaml")} | {"train.yaml"}
    assert shipped == checkout
    assert len([name for name in shipped if name.startswith("recipe/")]) == len(list(ROOT.glob("recipes/*.yaml")))
    told = run("-m", "moetrain", "check", "recipe=quickstart", folder=empty, PYTHONPATH=str(site))
    assert told.startswith("run:")
    assert "name: quickstart" in told
