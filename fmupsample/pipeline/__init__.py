"""From picture files to features and upsampled maps.

pipeline = Pipeline(backbone, upsampler, image_size=448)
for item in pipeline.items(["photos/", "cat.jpg"]):
    hr = pipeline.upsample(item)                    # [C, H, W]
    few = pipeline.upsample(item, value=scores)     # [V, H, W] of any map [V, h, w]
"""

from fmupsample.pipeline.features import FeaturePipeline, Item
from fmupsample.pipeline.maps import Kernels, Pipeline
from fmupsample.pipeline.opening import open_pipeline
from fmupsample.pipeline.sizes import map_sizes

__all__ = ["FeaturePipeline", "Item", "Kernels", "Pipeline", "map_sizes", "open_pipeline"]
