"""``moetrain inspect``: where tokens go in a trained model, to the terminal, as JSON and as one HTML file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from rich.text import Text

from moetrain.inspect.corpus import CorpusProfile, corpus_profile
from moetrain.inspect.corpus_table import corpus_lines
from moetrain.inspect.demo import WORDS, demo
from moetrain.inspect.loaded import Loaded, load
from moetrain.inspect.observe import observe
from moetrain.inspect.page import write_page
from moetrain.inspect.text import TextRoutes, as_batch, encode, shown, text_routes
from moetrain.inspect.text_table import text_lines
from moetrain.inspect.walk import Walk, walk
from moetrain.inspect.walk_text import walk_text
from moetrain.types import ConfigError, Problem

WALK_TOKENS = 6
NARROW = 40
DEMO_TITLE = "The routing walk: a tiny seeded router"


@dataclass(frozen=True)
class Asked:
    """What was asked for. path: a run folder or a checkpoint; None for the walk of a made-up layer. layers: blocks to
    show, all if there are none.
    """

    path: Path | None
    text: str | None = None
    corpus: bool = False
    walk: bool = False
    num_batches: int = 8
    layers: tuple[int, ...] = ()
    train_capacity: bool = False
    html: Path | None = None
    json: bool = False


@dataclass(frozen=True)
class Found:
    """What there is to show. title: of which checkpoint."""

    title: str
    text: TextRoutes | None
    corpus: CorpusProfile | None
    walk: str | None


def inspect(asked: Asked, console: Console) -> int:
    """Returns the exit code. Raises ConfigError for what can not be shown."""
    if problems := _problems(asked):
        raise ConfigError(problems)
    found = _look(asked)
    if asked.html is not None:
        write_page(asked.html, found.title, as_json(found))
    if asked.json:
        console.file.write(json.dumps(as_json(found), allow_nan=False) + "\n")
        return 0
    if asked.html is not None:
        console.print(Text(f"page in {asked.html}"))
        return 0
    _print(found, console)
    return 0


def as_json(found: Found) -> dict[str, Any]:
    """Plain values, for JSON."""
    return dataclasses.asdict(found)


def _problems(asked: Asked) -> list[Problem]:
    problems = []
    if asked.text is None and not asked.corpus and not asked.walk:
        fix = 'add --text "In the beginning", --corpus or --walk'
        problems.append(Problem("inspect", str(asked.path or ""), "does not say what to show", fix))
    if asked.path is None and (asked.text is not None or asked.corpus):
        fix = "give a run folder, or ask for --walk alone"
        problems.append(Problem("CKPT", None, "--text and --corpus need a checkpoint", fix))
    if asked.num_batches < 1:
        problems.append(Problem("--batches", asked.num_batches, "must be at least 1", "set --batches 8, say"))
    if asked.html is not None and not asked.html.resolve().parent.is_dir():
        problems.append(Problem("--html", str(asked.html), "lies in no folder", "make that folder first"))
    return problems


def _look(asked: Asked) -> Found:
    if asked.path is None:
        return Found(DEMO_TITLE, None, None, walk_text(walk(demo(), WORDS), DEMO_TITLE))
    loaded = load(asked.path)
    _check_layers(asked, loaded)
    how = {"train_capacity": asked.train_capacity}
    return Found(
        f"{loaded.path}, after step {loaded.step}",
        None if asked.text is None else text_routes(loaded, asked.text, asked.layers, **how),
        corpus_profile(loaded, asked.num_batches, asked.layers, **how) if asked.corpus else None,
        _walked(asked, loaded) if asked.walk else None,
    )


def _check_layers(asked: Asked, loaded: Loaded) -> None:
    known = [layer.router.site.layer for layer in loaded.model.moe_layers()]
    for layer in asked.layers:
        if layer not in known:
            fix = f"choose of {', '.join(str(one) for one in known)}"
            raise ConfigError([Problem("--layer", layer, "is no MoE layer of this model", fix)])


def _walked(asked: Asked, loaded: Loaded) -> str:
    """The first tokens of the text, by themselves, through one layer."""
    tokenizer = loaded.tokenizer()
    ids = encode(loaded, tokenizer, " ".join(WORDS) if asked.text is None else asked.text)[:WALK_TOKENS]
    seen, _ = observe(loaded.model, as_batch(ids), train_capacity=asked.train_capacity)
    one = next(one for one in seen if not asked.layers or one.layer in asked.layers)
    words = [shown(tokenizer, ids[place]) for place in one.place_T.tolist()]
    taken: Walk = walk(one, words)
    return walk_text(taken, f"The routing walk: layer {taken.layer} of `{loaded.path}`")


def _print(found: Found, console: Console) -> None:
    wide = max(console.width, NARROW)
    if found.text is not None or found.corpus is not None:
        console.print(Text(found.title), soft_wrap=True)
    if found.text is not None:
        for line in text_lines(found.text, wide):
            console.print(line, soft_wrap=True)
    if found.corpus is not None:
        for part in corpus_lines(found.corpus):
            console.print(part)
    if found.walk is not None:
        if console.is_terminal:
            console.print(Markdown(found.walk))
        else:
            console.file.write(found.walk)
