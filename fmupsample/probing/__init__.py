"""Linear probes on frozen, upsampled features: cached encodings, the fit, the metrics."""

from fmupsample.probing.cache import DiskStore, EncodedPicture, MemoryStore, View, encode
from fmupsample.probing.linear import Example, Fit, FitOptions, LinearProbe, fit_probe, predict
from fmupsample.probing.metrics import BoundaryF, Confusion, Segmentation, edge_band

__all__ = [
    "BoundaryF",
    "Confusion",
    "DiskStore",
    "EncodedPicture",
    "Example",
    "Fit",
    "FitOptions",
    "LinearProbe",
    "MemoryStore",
    "Segmentation",
    "View",
    "edge_band",
    "encode",
    "fit_probe",
    "predict",
]
