"""Feature files as arrays: ``fmupsample.open``, the compact format, and what both stand on."""

from fmupsample.features.array import FeatureArray
from fmupsample.features.compact import CompactFeatures
from fmupsample.features.dense import DenseFeatures
from fmupsample.features.opening import open_features
from fmupsample.features.shards import Shards, open_shards

__all__ = [
    "CompactFeatures",
    "DenseFeatures",
    "FeatureArray",
    "Shards",
    "open_features",
    "open_shards",
]
