"""Opens a page of a report, in headless Chromium or on the stage of page_stage.js, and asks it something."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

STAGE = Path(__file__).parent / "page_stage.js"
BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
NODE = shutil.which("node")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --virtual-time-budget=2000"
)
WATCH = """<script>window.faults = [];
window.addEventListener("error", (event) => window.faults.push(event.message));
document.addEventListener("securitypolicyviolation", (event) => window.faults.push(event.violatedDirective));
console.error = console.warn = (...words) => window.faults.push(words.join(" "));</script>"""
NEEDS_BROWSER = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on PATH")
# Those that can be opened here; a test that is given another one is skipped with the reason.
ENGINES = [
    pytest.param("chromium", marks=NEEDS_BROWSER),
    pytest.param("stage", marks=pytest.mark.skipif(NODE is None, reason="no node on PATH")),
]

# What every probe needs: the text of an element, a table's rows, a pixel of a canvas, a point to hover at.
TOOLS = """
  const id = (name) => document.getElementById(name);
  const all = (selector) => [...document.querySelectorAll(selector)];
  const rows = (selector) => all(selector + " tr").map((row) => [...row.children].map((cell) => cell.textContent));
  const pixel = (canvas, x, y) => [...canvas.getContext("2d").getImageData(x, y, 1, 1).data].slice(0, 3);
  const point = (canvas, x, y, kind) => {
    const box = canvas.getBoundingClientRect();
    canvas.dispatchEvent(new MouseEvent(kind, { clientX: box.left + x, clientY: box.top + y }));
  };
  const slide = (index) => {
    id("step").value = String(index);
    id("step").dispatchEvent(new Event("input"));
  };
  const center = (canvas, column, columns, row) =>
    [34 + Math.floor((column + 0.4) * (canvas.parentNode.clientWidth - 34) / columns), 26 * row + 10];
"""


def probe(body: str) -> str:
    """One expression: what ``body`` returns, with TOOLS at hand."""
    return f"(() => {{ {TOOLS} {body} }})()"


def ask(engine: str, page: Path, probe: str, folder: Path, dark: bool = False, size: str = "800,600") -> Any:
    """The value of the script ``probe``, run in the page; any error or warning of the page fails the test.

    size: of Chromium's window; the stage has one size only.
    """
    if engine == "stage":
        script = folder / "probe.js"
        script.write_text(probe)
        command = [str(NODE), str(STAGE), str(page), str(script), "dark" if dark else "light"]
        return json.loads(_run(command))
    copy = folder / "probed.html"
    text = page.read_text().replace("<head>", f"<head>{WATCH}", 1)
    # Not eval, which the page's policy forbids: the probe is one expression.
    answer = f"<pre id=answer></pre><script>answer.textContent = JSON.stringify([{probe.rstrip().rstrip(';')}, faults])"
    copy.write_text(text.replace("</body>", f"{answer}</script></body>"))
    dumped = _run([*chromium(folder, dark), f"--window-size={size}", "--dump-dom", copy.as_uri()])
    found = re.search(r'<pre id="answer">(.*?)</pre>', dumped, re.DOTALL)
    assert found is not None, dumped[-2000:]
    assert found[1], "the page's scripts did not run to their end"
    value, faults = json.loads(html.unescape(found[1]))
    assert faults == []
    return value


def screenshot(page: Path, picture: Path, folder: Path, dark: bool = False, size: str = "1440,2400") -> None:
    """What Chromium shows of a page, as PNG; for people to look at."""
    _run([*chromium(folder, dark), f"--window-size={size}", f"--screenshot={picture}", page.as_uri()])


def chromium(folder: Path, dark: bool) -> list[str]:
    assert BROWSER is not None
    shade = ["--blink-settings=preferredColorScheme=0"] if dark else []
    return [BROWSER, *FLAGS.split(), f"--user-data-dir={folder / 'browser'}", *shade]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
