"""The routes of a text in the terminal: a cell a token, wrapped like words; every colour is also said in figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.style import Style
from rich.text import Text

from moetrain.inspect.colours import style_of
from moetrain.inspect.text import Choice, LayerRoutes, TextRoutes, TokenRoute

GAP = 2
DROPPED = Style(dim=True, strike=True)
LEGEND = """\
Under each token the experts that it chose, best first: expert, weight, @slot in the expert's queue.
A choice with 'dropped' for a slot came too late for the expert's capacity; a lone '-' passed the layer by."""
IDENTITY = "'itself' is the weight of experts that compute nothing."


def text_lines(routes: TextRoutes, width: int) -> Iterator[Text]:
    """At most ``width`` wide where a single token is not wider."""
    yield from (Text(line) for line in LEGEND.splitlines())
    if any(route.identity for layer in routes.layers for route in layer.routes):
        yield Text(IDENTITY)
    for layer in routes.layers:
        yield Text()
        yield Text(_heading(layer), Style(bold=True))
        by_place = {route.place: route for route in layer.routes}
        yield from _wrapped([_cell(token, by_place.get(i)) for i, token in enumerate(routes.tokens)], width)


def _heading(layer: LayerRoutes) -> str:
    if layer.capacity is None:
        return f"layer {layer.layer}: {layer.num_experts} experts, no limit"
    dropped, every = layer.num_dropped, layer.num_choices
    share = f" ({dropped / every:.1%})" if every else ""
    slots = "slot" if layer.capacity == 1 else "slots"
    return (
        f"layer {layer.layer}: {layer.num_experts} experts of {layer.capacity} {slots}, "
        f"{dropped} of {every} choices dropped{share}"
    )


def _cell(token: str, route: TokenRoute | None) -> list[Text]:
    """The token over its choices, a line each."""
    if route is None or not (route.choices or route.identity):
        return [Text(token), Text("-")]
    head = Text(token, style_of(route.choices[0].expert) if route.choices else "")
    lines = [_choice(choice) for choice in route.choices]
    return [head, *lines, *([Text(f"itself {route.identity:.2f}")] if route.identity else [])]


def _choice(choice: Choice) -> Text:
    words = f"{choice.expert} {choice.weight:.2f}"
    if not choice.kept:
        return Text.assemble((words, DROPPED), " dropped")
    return Text.assemble((str(choice.expert), style_of(choice.expert)), f" {choice.weight:.2f} @{choice.slot}")


def _wrapped(cells: Sequence[list[Text]], width: int) -> Iterator[Text]:
    """Bands of cells side by side; the cells of a band are as high as the highest."""
    band: list[list[Text]] = []
    used = 0
    for cell in cells:
        wide = _width(cell) + GAP
        if band and used + wide - GAP > width:
            yield from _band(band)
            band, used = [], 0
        band.append(cell)
        used += wide
    yield from _band(band)


def _band(cells: Sequence[list[Text]]) -> Iterator[Text]:
    for row in range(max(len(cell) for cell in cells)):
        line = Text()
        for cell in cells:
            part = cell[row] if row < len(cell) else Text()
            line.append_text(part)
            line.append(" " * (_width(cell) - cell_len(part.plain) + GAP))
        line.rstrip()
        yield line
    yield Text()


def _width(cell: list[Text]) -> int:
    return max(cell_len(line.plain) for line in cell)
