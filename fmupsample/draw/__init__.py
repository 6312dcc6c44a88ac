"""Pictures of what features know: colours (PCA), similarity to a point, panels, contact sheets.

:mod:`.pca`, :mod:`.similarity` and :mod:`.foreground` turn features into a few numbers a pixel;
:mod:`.renderer` and :mod:`.films` turn those of one image or frame into a drawing. The other
modules, whose functions are here, draw arrays (uint8 RGB in and out) and know no model.
"""

from fmupsample.draw.contact import Entry, draw_sheet
from fmupsample.draw.heat import colour_bar, heat_colours, mark_point
from fmupsample.draw.overlay import darken, grey, overlay
from fmupsample.draw.panel import Panel, Tile, draw_panel
from fmupsample.draw.pca import PCABasis
from fmupsample.draw.tiles import blocks, tile_size

__all__ = [
    "Entry",
    "PCABasis",
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
