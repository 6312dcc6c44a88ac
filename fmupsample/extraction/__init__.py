"""``extract``: the plan of a run, the run itself, and the optional PCA of what is kept."""

from fmupsample.extraction.plan import ExtractOptions
from fmupsample.extraction.run import extract

__all__ = ["ExtractOptions", "extract"]
