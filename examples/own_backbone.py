"""Bring your own backbone: upsample any [B, C, h, w] features, from whatever model makes them.

    python examples/own_backbone.py examples/images/coffee.jpg --output own.png

The "backbone" here is a plain torch function of colours and edges, so that the example needs no
weights; put your own model in its place.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fmupsample import PCABasis, ReSFU, ReSFUConfig
from fmupsample.draw import Tile, blocks, draw_panel
from fmupsample.images import read_image
from fmupsample.upsamplers import Bilinear, JointBilateral

CELL = 16  # pixels per feature


def my_backbone(images: Tensor) -> Tensor:
    """``[B, 3, H, W]`` -> ``[B, 24, H/16, W/16]``: what is in each patch and around it."""
    right = F.pad(images[..., 1:] - images[..., :-1], (0, 1))
    down = F.pad(images[..., 1:, :] - images[..., :-1, :], (0, 0, 0, 1))
    pixels = torch.cat([images, images**2, 4 * right.abs(), 4 * down.abs()], dim=1)
    near = F.avg_pool2d(pixels, CELL)
    wide = F.avg_pool2d(F.pad(near, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return torch.cat([near, wide], dim=1)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture")
    parser.add_argument("--size", type=int, default=448, help="short side in pixels")
    parser.add_argument("--output", default="own_backbone.png")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    # Sides that are multiples of the cell; values as your model wants them (here: mean 0, std 1).
    photo = Image.fromarray(read_image(options.picture))
    scale = options.size / min(photo.size)
    width, height = (max(1, round(n * scale / CELL)) * CELL for n in photo.size)
    photo = photo.resize((width, height), Image.Resampling.BICUBIC)
    images = torch.frombuffer(bytearray(photo.tobytes()), dtype=torch.uint8).float()
    images = images.reshape(1, height, width, 3).permute(0, 3, 1, 2) / 255  # [1, 3, H, W]
    images = (images - images.mean()) / images.std()

    x = my_backbone(images)  # [1, C, h, w]
    channels = x.shape[1]
    upsamplers = {
        "Bilinear": Bilinear(),
        "Joint bilateral": JointBilateral(),
        # Untrained, so no better than its neighbours' average yet; training a head is up to you.
        "ReSFU (untrained)": ReSFU(ReSFUConfig(channels=channels)).eval(),
    }

    basis = PCABasis.fit(x[0].flatten(1).T)
    scores = basis.apply(x)  # [1, 3, h, w]
    cells = blocks(basis.to_rgb(scores[0]), (height, width))
    tiles = [Tile("Features", cells, f"{x.shape[2]} x {x.shape[3]}")]
    with torch.inference_mode():
        for name, up in upsamplers.items():
            y = up(x, images, size=(height, width))  # [1, C, H, W]: every channel
            print(f"{name}: {list(x.shape)} -> {list(y.shape)}")
            weights = up.kernels(x, images, (height, width))
            few = up.reassemble(weights, scores)  # [1, 3, H, W]: only what is drawn
            tiles.append(Tile(name, basis.to_rgb(few[0])))
    Image.fromarray(draw_panel(tiles).pixels).save(options.output)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
