"""The layer x expert load as a picture: one fixed diverging scale, so that pictures of different steps compare."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

# Blue for starved, near white for the fair share, red for overloaded: a scale that colour-blind people can read.
STARVED, FAIR, OVERLOADED = (33, 102, 172), (247, 247, 247), (178, 24, 43)
NO_TOKENS = (120, 120, 120)
INK, PAPER = (40, 40, 40), (255, 255, 255)
FONT_SIZE = 14


def colour(relative: float) -> tuple[int, int, int]:
    """Load over fair share -> RGB: 0 starved, 1 fair, 2 and above overloaded, NaN grey."""
    if np.isnan(relative):
        return NO_TOKENS
    other = STARVED if relative < 1.0 else OVERLOADED
    far = min(abs(relative - 1.0), 1.0)
    red, green, blue = (round(a + (b - a) * far) for a, b in zip(FAIR, other, strict=True))
    return red, green, blue


def heatmap(relative_LE: NDArray[np.float64], layers: Sequence[int], title: str) -> NDArray[np.uint8]:
    """Load over fair share, [L, E] -> RGB picture [height, width, 3]: a row a layer, a column an expert, and a scale.

    ``layers``: the decoder layer of each row.
    """
    num_layers, num_experts = relative_LE.shape
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
            draw.rectangle(box, fill=colour(float(relative_LE[i, j])))
    _expert_axis(draw, left, bottom, cell, num_experts)
    _scale(draw, left, bottom + 46)
    return np.asarray(picture)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(FONT_SIZE)


def _expert_axis(draw: ImageDraw.ImageDraw, left: int, y: int, cell: int, num_experts: int) -> None:
    every = max(1, -(-32 // cell))
    every = every if every == 1 else 1 << (every - 1).bit_length()
    for j in range(0, num_experts, every):
        draw.text((left + (j + 0.5) * cell, y + 4), str(j), INK, _font(), anchor="ma")
    draw.text((left - 8, y + 4), "expert", INK, _font(), anchor="ra")


def _scale(draw: ImageDraw.ImageDraw, left: int, y: int) -> None:
    """The legend: 0 to 2 times the fair share."""
    length = 240
    draw.text((left - 8, y + 7), "load", INK, _font(), anchor="rm")
    for x in range(length):
        draw.line((left + x, y, left + x, y + 14), fill=colour(2.0 * x / (length - 1)))
    for share, text in [(0.0, "0"), (0.5, "1 = fair share"), (1.0, "2+")]:
        draw.text((left + share * length, y + 18), text, INK, _font(), anchor="ma")
