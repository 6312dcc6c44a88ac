"""From picture files to features and upsampled maps.

pipeline = Pipeline(backbone, upsampler, image_size=ImageSize.parse("448"), device=device)
for item in pipeline.items(find_images(["photos"]), on_error=report):
    hr = pipeline.upsample(item)                    # [C, H, W]
    few = pipeline.upsample(item, value=scores)     # [V, H, W] of any map [V, h, w]
"""

from fmupsample.pipeline.features import FeaturePipeline, Item
from fmupsample.pipeline.maps import Kernels, Pipeline
from fmupsample.pipeline.sizes import map_sizes

__all__ = ["FeaturePipeline", "Item", "Kernels", "Pipeline", "map_sizes"]
