"""A run, or two beside each other, as one HTML file that needs nothing else: no network, no server, no library."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from moetrain.monitor.history import History, read_history
from moetrain.monitor.page_data import BYTES, page_run
from moetrain.types import ConfigError, Problem

SCRIPTS = ("heat.js", "domains.js", "curves.js", "main.js")
NAME = "report.html"


def report(run: Path, out: Path | None, compare: Path | None) -> Path:
    """``moetrain report``: write the page of the run folder ``run``, beside that of ``compare`` if there is one.

    Returns where it lies: ``out``, by default report.html in the folder ``run``.
    Raises ConfigError if a folder can not be read or the file not written.
    """
    text = page([read_history(folder) for folder in (run, compare) if folder is not None])
    target = run / NAME if out is None else out
    save(text, target, "--out", NAME)
    return target


def page(histories: Sequence[History]) -> str:
    """The whole page, of one run or of two."""
    assert len(histories) in (1, 2), len(histories)
    data = {"runs": [page_run(history, BYTES // len(histories)) for history in histories]}
    title = " and ".join(history.facts.id for history in histories)
    return assembled(page_part("body.html"), title, "", [page_part(name) for name in SCRIPTS], data)


def assembled(body: str, title: str, style: str, scripts: Sequence[str], data: object) -> str:
    """A page that needs nothing else. ``style`` and ``scripts`` come after style.css and base.js of monitor/page/."""
    parts = {
        "TITLE": html.escape(f"moetrain: {title}"),
        "STYLE": f"{page_part('style.css')}\n{style}",
        "BODY": body,
        "SCRIPT": "\n".join([page_part("base.js"), *scripts]),
        "DATA": embedded(data),
    }
    return re.sub(r"@([A-Z]+)@", lambda name: parts[name[1]], page_part("page.html"))


def save(text: str, target: Path, option: str, usual: str) -> None:
    """Write a page where ``option`` says, ``usual`` for example. Raises ConfigError."""
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        fix = f"give a file in a folder that can be written, e.g. {option} {usual}"
        raise ConfigError([Problem(option, str(target), error.strerror or str(error), fix)]) from None


def embedded(data: object) -> str:
    """JSON that no HTML parser takes for anything else, whatever words stand in it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def page_part(name: str) -> str:
    """A file of monitor/page/."""
    return (resources.files("moetrain.monitor") / "page" / name).read_text(encoding="utf-8")
