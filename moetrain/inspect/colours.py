"""One colour an expert, the same in the terminal and on the page: hues a golden angle apart and two lightnesses in
turn, so that neighbours differ.
"""

from __future__ import annotations

import colorsys

from rich.style import Style

GOLDEN = 0.381966
LIGHTNESSES, SATURATION = (0.8, 0.65), 0.62


def style_of(expert: int) -> Style:
    """Black on the colour of an expert."""
    rgb = colorsys.hls_to_rgb(expert * GOLDEN % 1.0, LIGHTNESSES[expert % 2], SATURATION)
    red, green, blue = (round(255 * part) for part in rgb)
    return Style(color="black", bgcolor=f"rgb({red},{green},{blue})")
