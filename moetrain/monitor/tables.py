"""The layer x expert load in the terminal: numbers for few experts, heat blocks for many; 1.00 is the fair share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rich.console import Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

from moetrain.monitor.balance import Balance, relative_load
from moetrain.monitor.heatmap import colour
from moetrain.types import LoadCounts

MAX_NUMBERS = 16
NUMBER_WIDTH = 5
# What stands in a block where there are no colours: from starved to twice the fair share and more.
SHADES = " ░▒▓█"
# What the columns layer, worst and drop take, with the gaps between them.
FRAME = 20


def load_table(load: LoadCounts, balance: Balance, width: int) -> Group:
    """A row a layer, coloured on a fixed scale: 0 blue, 1 (fair) white, 2 and more red. At most ``width`` wide."""
    relative_LE = relative_load(load.assigned_LE.cpu().numpy())
    num_experts = relative_LE.shape[1]
    room = max(width - FRAME, 8)
    if num_experts <= MAX_NUMBERS and num_experts * NUMBER_WIDTH <= room:
        cells = [_numbers(row_E) for row_E in relative_LE]
        head, caption = _number_head(num_experts), "1.00 is the fair share"
    else:
        per_block = math.ceil(num_experts / room)
        cells = [_blocks(row_E, per_block) for row_E in relative_LE]
        head = Text(f"experts 0 to {num_experts - 1}")
        caption = _block_caption(per_block)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("layer", justify="right")
    table.add_column(head, no_wrap=True)
    table.add_column("worst", justify="right")
    table.add_column("drop", justify="right")
    for one, cell in zip(balance.layers, cells, strict=True):
        table.add_row(str(one.layer), cell, _number(one.load_max), _share(one.drop_fraction))
    return Group(Text(f"Expert load, layer x expert: {caption}", style="bold"), table)


def _number_head(num_experts: int) -> Text:
    return Text("".join(f"{e:^{NUMBER_WIDTH}}" for e in range(num_experts)))


def _numbers(row_E: NDArray[np.float64]) -> Text:
    text = Text()
    for value in row_E:
        text.append(f"{_number(value):^{NUMBER_WIDTH}}", _style(value))
    return text


def _blocks(row_E: NDArray[np.float64], per_block: int) -> Text:
    text = Text()
    for group in _groups(row_E, per_block):
        worst = max(group, key=lambda value: abs(value - 1.0))
        shade = "?" if math.isnan(worst) else SHADES[min(round(worst * 2), len(SHADES) - 1)]
        text.append(shade, _style(worst))
    return text


def _groups(row_E: NDArray[np.float64], size: int) -> list[Sequence[float]]:
    return [row_E[i : i + size].tolist() for i in range(0, len(row_E), size)]


def _block_caption(per_block: int) -> str:
    scale = f"'{SHADES[0]}' 0, '{SHADES[2]}' 1 = fair share, '{SHADES[4]}' 2 or more"
    return scale if per_block == 1 else f"{scale}; a block shows the worst of {per_block} experts"


def _number(value: float) -> str:
    """Four characters at most."""
    return "none" if math.isnan(value) else f"{value:.2f}" if value < 9.995 else f"{value:.0f}"


def _share(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.1%}"


def _style(value: float) -> Style:
    red, green, blue = colour(value)
    dark = red * 0.299 + green * 0.587 + blue * 0.114 < 140
    return Style(color="white" if dark else "black", bgcolor=f"rgb({red},{green},{blue})")
