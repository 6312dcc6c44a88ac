"""What can be read off features: principal components as colours, foreground, similarity."""

from fmupsample.analysis.foreground import Split
from fmupsample.analysis.pca import PCABasis
from fmupsample.analysis.similarity import similarity_maps

__all__ = ["PCABasis", "Split", "similarity_maps"]
