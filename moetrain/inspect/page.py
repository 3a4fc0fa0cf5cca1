"""Where tokens go, as one HTML file that needs nothing else; its look and its tools are those of the report."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from moetrain.monitor.html import assembled, save

SCRIPTS = ("tokens.js", "profiles.js", "main.js")


def write_page(target: Path, title: str, data: Mapping[str, Any]) -> None:
    """data: what ``command.as_json`` gives. Raises ConfigError if the file can not be written."""
    scripts = [_own(name) for name in SCRIPTS]
    text = assembled(_own("body.html"), title, _own("style.css"), scripts, {**data, "runs": []})
    save(text, target, "--html", "tokens.html")


def _own(name: str) -> str:
    return (resources.files("moetrain.inspect") / "page" / name).read_text(encoding="utf-8")
