"""Layer x expert pictures of the load and of what was dropped, on fixed scales: those of different steps compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

# Blue for starved, near white for the fair share, red for overloaded: a scale that colour-blind people can read.
STARVED, FAIR, OVERLOADED = (33, 102, 172), (247, 247, 247), (178, 24, 43)
NOTHING, MUCH = (247, 247, 247), (84, 39, 136)
NO_TOKENS = (120, 120, 120)
MOST_DROPPED = 0.5
INK, PAPER = (40, 40, 40), (255, 255, 255)
FONT_SIZE = 14


Colour = tuple[int, int, int]


def colour(relative: float) -> Colour:
    """Load over fair share -> RGB: 0 starved, 1 fair, 2 and above overloaded, NaN grey."""
    if np.isnan(relative):
        return NO_TOKENS
    return _between(FAIR, STARVED if relative < 1.0 else OVERLOADED, min(abs(relative - 1.0), 1.0))


def drop_colour(fraction: float) -> Colour:
    """Dropped share -> RGB: white nothing, violet half and above, NaN grey."""
    if np.isnan(fraction):
        return NO_TOKENS
    return _between(NOTHING, MUCH, min(fraction / MOST_DROPPED, 1.0))


@dataclass(frozen=True)
class Scale:
    """How values 0..top become colours, and what stands below the legend, at which part of its length."""

    name: str
    top: float
    colour: Callable[[float], Colour]
    marks: tuple[tuple[float, str], ...]


LOAD = Scale("load", 2.0, colour, ((0.0, "0"), (0.5, "1 = fair share"), (1.0, "2+")))
DROP = Scale("dropped", MOST_DROPPED, drop_colour, ((0.0, "0 %"), (1.0, "50 %+")))


def heatmap(values_LE: NDArray[np.float64], layers: Sequence[int], title: str, scale: Scale) -> NDArray[np.uint8]:
    """[L, E] -> RGB picture [height, width, 3]: a row a layer, a column an expert, and the legend of the scale.

    ``layers``: the decoder layer of each row.
    """
    num_layers, num_experts = values_LE.shape
    cell = max(4, min(40, 960 // num_experts))
    row = max(FONT_SIZE + 4, min(40, cell))
    left, top = 80, 32
    width = max(left + num_experts * cell + 24, 420)
    bottom = top + num_layers * row
    picture = Image.new("RGB", (width, bottom + 92), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((left, 8), title, INK, _font())
    for i, layer in enumerate(layers):
        draw.text((left - 8, top + i * row + row / 2), f"layer {layer}", INK, _font(), anchor="rm")
        for j in range(num_experts):
            box = (left + j * cell, top + i * row, left + (j + 1) * cell - 1, top + (i + 1) * row - 1)
            draw.rectangle(box, fill=scale.colour(float(values_LE[i, j])))
    _expert_axis(draw, left, bottom, cell, num_experts)
    _legend(draw, left, bottom + 46, scale)
    return np.asarray(picture)


def _between(low: Colour, high: Colour, share: float) -> Colour:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(low, high, strict=True))
    return red, green, blue


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(FONT_SIZE)


def _expert_axis(draw: ImageDraw.ImageDraw, left: int, y: int, cell: int, num_experts: int) -> None:
    every = max(1, -(-32 // cell))
    every = every if every == 1 else 1 << (every - 1).bit_length()
    for j in range(0, num_experts, every):
        draw.text((left + (j + 0.5) * cell, y + 4), str(j), INK, _font(), anchor="ma")
    draw.text((left - 8, y + 4), "expert", INK, _font(), anchor="ra")


def _legend(draw: ImageDraw.ImageDraw, left: int, y: int, scale: Scale) -> None:
    length = 240
    draw.text((left - 8, y + 7), scale.name, INK, _font(), anchor="rm")
    for x in range(length):
        draw.line((left + x, y, left + x, y + 14), fill=scale.colour(scale.top * x / (length - 1)))
    for share, text in scale.marks:
        draw.text((left + share * length, y + 18), text, INK, _font(), anchor="ma")
