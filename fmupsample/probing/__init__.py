"""Linear probes on frozen, upsampled features: cached encodings, the fit, the metrics."""

from fmupsample.probing.batches import Example
from fmupsample.probing.cache import EncodedPicture, View, encode
from fmupsample.probing.linear import LinearProbe, predict
from fmupsample.probing.metrics import BoundaryF, Confusion, Segmentation, edge_band
from fmupsample.probing.options import FitOptions
from fmupsample.probing.store import Store
from fmupsample.probing.training import Fit, fit_probe

__all__ = [
    "BoundaryF",
    "Confusion",
    "EncodedPicture",
    "Example",
    "Fit",
    "FitOptions",
    "LinearProbe",
    "Segmentation",
    "Store",
    "View",
    "edge_band",
    "encode",
    "fit_probe",
    "predict",
]
