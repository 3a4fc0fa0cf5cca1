"""Where tokens go, as one HTML file that needs nothing else; its look and its tools are those of the report."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from moetrain.monitor.html import assembled, page_part
from moetrain.types import ConfigError, Problem

SCRIPTS = ("tokens.js", "profiles.js", "main.js")


def write_page(target: Path, title: str, data: Mapping[str, Any]) -> None:
    """data: what ``command.as_json`` gives. Raises ConfigError if the file can not be written."""
    scripts = [page_part("base.js"), *(_own(name) for name in SCRIPTS)]
    style = f"{page_part('style.css')}\n{_own('style.css')}"
    text = assembled(_own("page.html"), f"moetrain: {title}", style, scripts, {**data, "runs": []})
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        fix = "give a file in a folder that can be written, e.g. --html tokens.html"
        raise ConfigError([Problem("--html", str(target), error.strerror or str(error), fix)]) from None


def _own(name: str) -> str:
    return (resources.files("moetrain.inspect") / "page" / name).read_text(encoding="utf-8")
