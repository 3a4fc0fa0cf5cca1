"""What each expert specialises in, as a table a layer."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from moetrain.inspect.colours import style_of
from moetrain.inspect.corpus import CorpusProfile, ExpertProfile, LayerProfile

# From nothing over the fair share, in the middle, to twice that and more.
BARS = "▁▂▃▄▅▆▇"
NO_TOKEN = "?"
LEGEND = (
    "load: assignments over the fair share; by eighth: the same in each eighth of the sequence, from ▁ none over ▄ "
    "fair to ▇ twice the fair share or more; together: experts that its tokens chose too, and how many did; tokens: "
    "by lift, their share of the expert's tokens over their share of all, those that it got {min_count} times at least"
)
LEGEND_DOMAINS = "domains: those whose tokens choose the expert most often, over how often all tokens do"
TOP_DOMAINS = 3


def corpus_lines(profile: CorpusProfile) -> Iterator[RenderableType]:
    yield Text(f"{profile.source}: {profile.num_tokens:,} validation tokens, loss {profile.loss:.3f} nats")
    legend = LEGEND.format(min_count=profile.min_count)
    yield Text(f"{legend}; {LEGEND_DOMAINS}" if profile.domains else legend)
    for layer in profile.layers:
        yield Text()
        yield Text(_heading(layer), Style(bold=True))
        yield _table(layer, profile.domains)


def _heading(layer: LayerProfile) -> str:
    words = [f"layer {layer.layer}: {layer.num_experts} experts"]
    if layer.entropy is not None:
        words.append(f"router entropy {layer.entropy:.2f} of {layer.uniform:.2f} nats")
    if layer.vocabulary is not None:
        words.append(f"a token id goes to its favourite expert {layer.vocabulary:.0%} of the time")
    if layer.divergence is not None:
        words.append(f"domain divergence {layer.divergence:.2f}")
    return ", ".join(words)


def _table(layer: LayerProfile, domains: tuple[str, ...]) -> Table:
    together = any(one.partners for one in layer.experts)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("expert", "load", "dropped"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("by eighth", no_wrap=True)
    if together:
        table.add_column("together", no_wrap=True)
    if domains:
        table.add_column("domains", ratio=1)
    table.add_column("tokens", ratio=1)
    for one in layer.experts:
        partners = " ".join(f"{partner.expert}:{partner.share:.0%}" for partner in one.partners)
        dropped = "-" if one.dropped is None else f"{one.dropped:.1%}"
        numbers = (f"{one.load:.2f}", dropped, bars(one), *([partners] if together else []))
        told = [_domains(one, domains)] if domains else []
        table.add_row(Text(str(one.expert), style_of(one.expert)), *numbers, *told, _tokens(one))
    return table


def _domains(one: ExpertProfile, names: tuple[str, ...]) -> Text:
    """The highest first."""
    lifts = [(lift, name) for lift, name in zip(one.domains, names, strict=True) if lift is not None]
    text = Text()
    for lift, name in sorted(lifts, key=lambda pair: -pair[0])[:TOP_DOMAINS]:
        text.append(name)
        text.append(f"×{lift:.1f} ", Style(dim=True))
    return text


def bars(one: ExpertProfile) -> str:
    """The load in each eighth of the sequence."""
    top = len(BARS) - 1
    return "".join(NO_TOKEN if load is None else BARS[min(round(load / 2 * top), top)] for load in one.positions)


def _tokens(one: ExpertProfile) -> Text:
    """Each with its lift; a line breaks between two tokens only, as white space in a token is shown otherwise."""
    text = Text()
    for token in one.tokens:
        text.append(token.text)
        text.append(f"×{token.lift:.1f} ", Style(dim=True))
    return text
