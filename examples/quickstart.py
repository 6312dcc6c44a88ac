"""fmupsample as a library: dense features of one picture, and three things to do with them.

python examples/quickstart.py examples/images/cat.jpg --output cat.png
"""

from __future__ import annotations

import argparse

import torch
from PIL import Image

import fmupsample
from fmupsample.draw.similarity import similarity_maps


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture")
    parser.add_argument("--backbone", default="embedded", help="any timm name or alias")
    parser.add_argument("--upsampler", help="default: the backbone's trained head")
    parser.add_argument("--output", default="features.png")
    options = parser.parse_args(arguments)

    # Two models: the frozen backbone, and the upsampler that goes with it.
    backbone = fmupsample.load_backbone(options.backbone)
    up = fmupsample.load_upsampler(backbone, options.upsampler)

    # A pipeline decodes and resizes as the backbone wants it; one item is one picture.
    pipeline = fmupsample.Pipeline(backbone, up)
    try:
        [item] = pipeline.items([options.picture])
    except fmupsample.FmupsampleError as error:
        raise SystemExit(f"error: {error}") from None
    x = item.features  # [C, h, w], one vector per patch
    print(f"{backbone.name}: {x.shape[0]} channels on a {x.shape[1]} x {x.shape[2]} grid")

    # 1. The features of every pixel. `up(x[None], item.image[None])` is the same without cropping.
    dense = pipeline.upsample(item)  # [C, H, W]
    print(f"upsampled to {dense.shape[1]} x {dense.shape[2]} pixels by {up.name}")

    # 2. Their principal components as colours. Kernel weights sum to 1, so three scores may be
    #    upsampled instead of C channels: the same picture, for a fraction of the work and memory.
    basis = fmupsample.PCABasis.fit(x.flatten(1).T)
    scores = pipeline.upsample(item, value=basis.apply(x))  # [3, H, W]
    torch.testing.assert_close(scores, basis.apply(dense), rtol=1e-3, atol=1e-3)
    Image.fromarray(basis.to_rgb(scores)).save(options.output)
    print(f"wrote {options.output}")

    # 3. How similar is everything to the middle of the picture? Exact, and no [C, H, W] map either.
    height, width = dense.shape[1:]
    kernels = pipeline.kernels(item)
    _, similarity = similarity_maps(x, kernels.apply, [(height // 2, width // 2)])  # [1, H, W]
    share = (similarity > 0.8).float().mean()
    print(f"{share:.0%} of the picture has a cosine above 0.8 to its middle")


if __name__ == "__main__":
    main()
