"""``visualize``: a run over pictures (run), the drawing (draw), and where it goes (album)."""

from fmupsample.visualization.draw import Point
from fmupsample.visualization.run import VisualizeOptions, visualize

__all__ = ["Point", "VisualizeOptions", "visualize"]
