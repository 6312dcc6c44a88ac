"""Image matting with a small encoder-decoder, and any upsampler, also those of the encoder.

In the manner of IndexNet Matting: where an upsampler has a half that pools (IndexNet, A2U, max
unpooling), the encoder pools with it, and the decoder goes back by what it found. With the others
the encoder takes maxima, and the guidance is the encoder's map.

python examples/matting.py --upsamplers nearest max-unpooling indexnet a2u sapa
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from decoders import A2U, IndexNet, MaxUnpooling, build
from torch import Tensor, nn

from fmupsample.upsamplers import Upsampler

from scenes import Scenes, draw_scenes, fit, print_row


def block(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()
    )


class Level(nn.Module):
    """One halving, and the way back, with what the way down left for it."""

    def __init__(self, upsampler: str, width: int) -> None:
        super().__init__()
        self.up: Upsampler = build(upsampler, width)

    def down(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if isinstance(self.up, IndexNet | A2U | MaxUnpooling):
            return self.up.downsample(x)
        return F.max_pool2d(x, 2, ceil_mode=True), None

    def back(self, x: Tensor, encoder: Tensor, left: Tensor | None) -> Tensor:
        """``x`` at the size of ``encoder``, odd or not."""
        if isinstance(self.up, IndexNet):
            return self.up.upsample(x, left)
        if isinstance(self.up, A2U):
            return self.up.reassemble(left, x)
        if isinstance(self.up, MaxUnpooling):
            return self.up.upsample(x, left, tuple(encoder.shape[2:]))
        return self.up(x, encoder)


class MattingNet(nn.Module):
    """A picture and its trimap, ``[B, 4, H, W]`` -> alpha ``[B, 1, H, W]``.

    Args:
        upsampler: a name that :func:`decoders.build` knows.
        levels: how often the size is halved.
    """

    def __init__(self, upsampler: str, width: int = 16, levels: int = 3) -> None:
        super().__init__()
        self.first = block(4, width)
        self.encoder = nn.ModuleList(block(width, width) for _ in range(levels))
        self.levels = nn.ModuleList(Level(upsampler, width) for _ in range(levels))
        self.decoder = nn.ModuleList(block(2 * width, width) for _ in range(levels))
        self.alpha = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        known = x[:, 3:]
        x, passed = self.first(x), []
        for level, layer in zip(self.levels, self.encoder, strict=True):
            low, left = level.down(x)
            passed.append((x, left))
            x = layer(low)
        stages = zip(self.levels, self.decoder, passed, strict=True)
        for level, layer, (encoder, left) in reversed(list(stages)):
            x = layer(torch.cat([level.back(x, encoder, left), encoder], 1))
        alpha = self.alpha(x).sigmoid()
        # What the trimap knows needs no prediction.
        return torch.where(known == 0, alpha, (known > 0).to(alpha))


def with_trimap(scenes: Scenes, width: int = 5) -> Tensor:
    """``[N, 4, H, W]``: pictures, and 1 object, -1 ground, 0 unknown within ``width`` pixels."""
    size = 2 * width + 1
    most = F.max_pool2d(scenes.alpha, size, 1, width)
    least = -F.max_pool2d(-scenes.alpha, size, 1, width)
    trimap = torch.zeros_like(scenes.alpha)
    trimap[least == 1] = 1
    trimap[most == 0] = -1
    return torch.cat([scenes.image, trimap], 1)


def loss(model: nn.Module, scenes: Scenes) -> Tensor:
    return (model(with_trimap(scenes)) - scenes.alpha).abs().mean()


@torch.no_grad()
def measure(model: nn.Module, scenes: Scenes) -> dict[str, float]:
    """Mean absolute error of alpha where the trimap says unknown, and its gradients' error."""
    shown = with_trimap(scenes)
    alpha, unknown = model(shown), shown[:, 3:] == 0
    error = (alpha - scenes.alpha).abs()[unknown].mean().item()
    sharp = (alpha.diff(dim=3) - scenes.alpha.diff(dim=3)).abs()[unknown[..., 1:]].mean().item()
    return {"error": error, "gradient": sharp}


def compare(upsampler: str, steps: int, seed: int = 0) -> dict[str, float]:
    """Train with an upsampler, and measure on scenes that were not trained on."""
    torch.manual_seed(seed)
    model = MattingNet(upsampler)
    fit(model, loss, draw_scenes(64, seed=seed), steps)
    return measure(model, draw_scenes(16, seed=1000))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upsamplers", nargs="+", default=["nearest", "indexnet", "a2u", "sapa"])
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args(arguments)
    for name in options.upsamplers:
        print_row(name, compare(name, options.steps))


if __name__ == "__main__":
    main()
