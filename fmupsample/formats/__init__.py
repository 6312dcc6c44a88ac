"""Feature files as arrays: ``fmupsample.open``, the compact format, and what both stand on."""

from fmupsample.formats.array import FeatureArray
from fmupsample.formats.compact import CompactFeatures
from fmupsample.formats.dense import DenseFeatures
from fmupsample.formats.opening import open_features
from fmupsample.formats.shards import Shards, open_shards

__all__ = [
    "CompactFeatures",
    "DenseFeatures",
    "FeatureArray",
    "Shards",
    "open_features",
    "open_shards",
]
