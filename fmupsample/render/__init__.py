"""Pictures for people: panels, overlays, heat maps, contact sheets. uint8 RGB arrays in and out.

Nothing here knows a model: the arrays come from :mod:`fmupsample.render.renderer`.
"""

from __future__ import annotations

from fmupsample.render.contact import Entry, draw_sheet
from fmupsample.render.heat import colour_bar, heat_colours, mark_point
from fmupsample.render.overlay import darken, grey, overlay
from fmupsample.render.panel import Panel, Tile, draw_panel
from fmupsample.render.tiles import blocks, tile_size

__all__ = [
    "Entry",
    "Panel",
    "Tile",
    "blocks",
    "colour_bar",
    "darken",
    "draw_panel",
    "draw_sheet",
    "grey",
    "heat_colours",
    "mark_point",
    "overlay",
    "tile_size",
]
