"""What upsamplers cost, by formula: parameters, and multiply-adds.

Published tables count a multiply-add as one operation, and so does this one. Counted are
convolutions and linear maps, similarities, bilinear samples at learned places, and reassembly; not
norms, activations, softmax, and the resizing of guidance.

The formulas are those of the methods as they are published (an implementation may need fewer:
ReSFU's shortcuts are in ``keys.py``). Letters: C channels of the features, G of the guidance, K the
kernel's side, r the ratio of an operator; "LR" counts are per cell, "HR" per output pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from fmupsample.errors import UsageError
from fmupsample.upsamplers.a2u import A2UConfig
from fmupsample.upsamplers.affinity import AffinityConfig
from fmupsample.upsamplers.affinity.encoder import STAGES, STEM
from fmupsample.upsamplers.affinity.scores import EXTRAS
from fmupsample.upsamplers.anyup import AnyUpConfig
from fmupsample.upsamplers.anyup.attention import reach_of
from fmupsample.upsamplers.carafe import CARAFEConfig
from fmupsample.upsamplers.config import Config
from fmupsample.upsamplers.convolution import DeconvolutionConfig, PixelShuffleConfig
from fmupsample.upsamplers.dysample import DySampleConfig
from fmupsample.upsamplers.fade import FADEConfig
from fmupsample.upsamplers.featup import LearnedBilateralConfig
from fmupsample.upsamplers.indexnet import IndexNetConfig
from fmupsample.upsamplers.lda_aqu import LDAAQUConfig
from fmupsample.upsamplers.resfu import ReSFUConfig, UniversalReSFUConfig
from fmupsample.upsamplers.sapa import SAPAConfig
from fmupsample.upsamplers.stack import Stack, StackConfig

# Multiply-adds of one bilinear sample of one channel, and of one bicubic one.
_BILINEAR, _BICUBIC = 4, 16


@dataclass(frozen=True)
class Cost:
    """What one picture costs.

    Attributes:
        parameters: numbers that are learned.
        convolution: multiply-adds of layers with these.
        neighbours: multiply-adds of similarities, samples and reassembly.
    """

    parameters: int
    convolution: int
    neighbours: int

    @property
    def macs(self) -> int:
        return self.convolution + self.neighbours

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.parameters + other.parameters,
            self.convolution + other.convolution,
            self.neighbours + other.neighbours,
        )


def cost(
    config: Config, cells: tuple[int, int], pixels: tuple[int, int], channels: int = 0
) -> Cost:
    """Of an operator that makes ``cells`` into ``pixels``; its configuration says which it is.

    Args:
        channels: of the features, for one that takes any number of them.

    Raises:
        UsageError: a configuration without a formula (a stack's: see :func:`stack_cost`).
    """
    if isinstance(config, AffinityConfig):
        return _affinity(config, prod(cells), prod(pixels), channels)
    if isinstance(config, AnyUpConfig):
        return _anyup(config, cells, prod(pixels), channels)
    if isinstance(config, UniversalReSFUConfig):
        one = cost(config.specialised(channels), cells, pixels)
        return Cost(one.parameters - channels * config.embedding, one.convolution, one.neighbours)
    for kind, formula in _FORMULAS.items():
        if type(config) is kind:
            return formula(config, prod(cells), prod(pixels))
    raise UsageError(f"there is no formula for {type(config).__name__}")


def stack_cost(
    kind: type[Stack], config: StackConfig, cells: tuple[int, int], pixels: tuple[int, int]
) -> Cost:
    """Of a stack: all its parameters, and the stages that these sizes need."""
    own = kind.operator_config.from_dict({"channels": config.channels, **config.operator})
    total, size = Cost(0, 0, 0), cells
    for _ in range(config.stages):
        ratio = getattr(own, "ratio", 2)
        larger = (size[0] * ratio, size[1] * ratio)
        one = cost(own, size, larger)
        if size[0] >= pixels[0] and size[1] >= pixels[1]:
            one = Cost(one.parameters, 0, 0)
        else:
            size = larger
        total += one
    if kind.name == "featup":
        c = config.channels
        total += Cost(c * c + c, c * c * prod(size), 0)
    if size != pixels:
        total += Cost(0, 0, _BILINEAR * config.channels * prod(pixels))
    return total


def training_free_cost(
    name: str, channels: int, cells: tuple[int, int], pixels: tuple[int, int]
) -> Cost:
    """Of a method without parameters, as :func:`fmupsample.load_upsampler` builds it."""
    lr, hr, c = prod(cells), prod(pixels), channels
    window = 25  # of jbu's default
    neighbours = {
        "nearest": 0,
        "bilinear": _BILINEAR * c * hr,
        "bicubic": _BICUBIC * c * hr,
        "jbu": (3 + c) * window * hr,
        # Three slopes and an offset are fitted per cell, enlarged, and applied.
        "guided": (3 * c + 9 + 9 * c) * lr + (4 * _BILINEAR * c + 3 * c) * hr,
        "max-unpooling": 0,
    }
    if name not in neighbours:
        raise UsageError(f"there is no formula for {name!r}")
    return Cost(0, 0, neighbours[name])


def _stem(guidance: int) -> int:
    return 27 * guidance + 9 * guidance**2


def _resfu(c: ReSFUConfig, lr: int, hr: int) -> Cost:
    """Queries and keys; per pair a K x K difference convolution, two 1x1; fine reassembly."""
    k, e, m, g = c.kernel_size**2, c.embedding, c.middle, c.guidance_channels
    stem = _stem(g) if c.stem else 0
    parameters = stem + (2 * g if c.stem else 0) + 2 * g + g * e + e
    convolution = (stem + g * e) * hr
    neighbours = (c.kernel_size + 1) ** 2 * c.channels * hr
    if c.semantic:
        parameters += c.channels * e + (2 * c.channels + e if c.keys == "learned" else 0)
        convolution += c.channels * e * lr
    pairs = int(c.semantic) + int(c.detail)
    if c.similarity == "distance":
        shared = c.semantic and c.keys == "projected"
        parameters += pairs * e - (e - 1 if shared else 0)
        return Cost(parameters, convolution, neighbours + pairs * k * e * hr)
    if c.similarity == "inner":
        return Cost(parameters + pairs * 2 * e, convolution, neighbours + pairs * k * e * hr)
    difference, mix, score = k * e // c.groups * m, m // c.groups * m, m * k
    parameters += pairs * (2 * e + difference + m + mix + m + 2 * m + score + k)
    return Cost(parameters, convolution + pairs * (difference + mix + score) * hr, neighbours)


def _affinity(c: AffinityConfig, lr: int, hr: int, channels: int) -> Cost:
    """The encoder, keys of cells, K^2 (E + 4) HR of similarities, K^2 C HR of reassembly."""
    e, w, d, k = c.embedding, c.width, c.detail, c.kernel_size**2
    outputs, share = e + EXTRAS, 1 / 4  # of the image's pixels, at half its size
    layers = [(27 * STEM, STEM, share)]  # multiply-adds a pixel, biases, pixels
    for number, stage in enumerate(STAGES):
        middle, before = stage.inputs * stage.expansion, share
        share /= stage.stride**2
        if stage.expansion > 1:
            layers.append((stage.inputs * middle, middle, before))
        layers.append((stage.kernel**2 * middle, middle, share))
        layers.append((middle * stage.outputs, stage.outputs, share))
        if number + 1 == len(STAGES) or STAGES[number + 1].stride == 2:
            layers += [(stage.outputs * w, w, share), (9 * w, w, share)]
            layers += [(2 * w * w, 2 * w, share), (2 * w * w, w, share)]
    layers += [(w * outputs, outputs, 1 / 4), (27 * d, d, 1), (9 * d * d, d, 1)]
    layers += [(d * outputs, 0, 1)]
    keys = [(2 * e * (e + 1), e + 1), (18 * e * c.key_width, c.key_width)]
    keys += [(c.key_width * (e + 1), e + 1)]
    parameters = sum(macs + biases for macs, biases, _ in layers) + sum(map(sum, keys))
    convolution = round(sum(macs * part for macs, _, part in layers) * hr)
    convolution += sum(macs for macs, _ in keys) * lr
    return Cost(parameters, convolution, k * (e + 4 + channels) * hr)


def _anyup(c: AnyUpConfig, cells: tuple[int, int], hr: int, channels: int) -> Cost:
    """Three encoders and a 3x3 convolution at HR; keys at LR; K^2 (E + C) HR of attention."""
    e, lr, k = c.embedding, prod(cells), 2 * reach_of(cells, c.window_ratio) + 1
    blocks, norms, filters = 4 * e * e, 8 * e, c.feature_kernel**2 * e
    joint, around = 18 * e * e, 9 * e * e
    # The encoders of the image, queries, keys, features and both together.
    parameters = 5 * (blocks + norms) + 3 * e + 2 * e * e + filters + joint
    # The 3x3 convolution, two projections and norms, and the frequencies of places.
    parameters += around + 2 * (e + 1) * e + 2 * e + 2 * e
    convolution = (3 * e + 2 * e * e + 3 * blocks + around + e * e) * hr
    convolution += (filters * channels + joint + 2 * blocks + e * e) * lr
    return Cost(parameters, convolution, k * k * (e + channels) * hr)


def _sapa(c: SAPAConfig, lr: int, hr: int) -> Cost:
    """inner: 2 K^2 C HR; else (G d + K^2 d + K^2 C) HR + C d LR, and the own part at LR."""
    k, d, g = c.kernel_size**2, c.embedding, c.guidance_channels
    stem = _stem(g) if c.stem else 0
    parameters, convolution = stem + (2 * g if c.stem else 0), stem * hr
    if c.similarity == "inner":
        return Cost(parameters, convolution, 2 * k * c.channels * hr)
    parameters += (2 * g + 2 * c.channels if c.norm else 0) + (g + 1) * d + (c.channels + 1) * d
    convolution += g * d * hr + c.channels * d * lr
    neighbours = (k * d + k * c.channels) * hr
    if c.similarity in ("gated", "addition"):
        parameters += (c.channels + 1) * d
        convolution += c.channels * d * lr
        neighbours += k * d * lr
    if c.similarity == "gated":
        parameters += c.channels + 1
        convolution += c.channels * lr
    return Cost(parameters, convolution, neighbours)


def _lda_aqu(c: LDAAQUConfig, lr: int, hr: int) -> Cost:
    """Projections at LR; offsets, and K^2 samples of keys and features, at HR."""
    k, d, taps = c.kernel_size**2, c.hidden, c.offset_kernel_size**2
    own = d // c.groups
    parameters = 2 * c.channels + 2 * c.channels * d + 9 * own + 2 * own
    parameters += own * 2 * k * taps + 2 * k + (k * d if c.bias else 0)
    convolution = 2 * c.channels * d * lr + (9 * d + 2 * k * taps * d) * hr
    return Cost(parameters, convolution, k * (1 + _BILINEAR) * (d + c.channels) * hr)


def _fade(c: FADEConfig, lr: int, hr: int) -> Cost:
    """Both maps compressed and convolved; K^2 C HR of reassembly."""
    k, g = c.kernel_size**2, c.guidance_channels
    m = k if c.lite else c.compressed
    encode = (1 if c.lite else m) * k * c.encoder_kernel_size**2
    stem = _stem(g) if c.stem else 0
    parameters = stem + (2 * g if c.stem else 0) + (g + 1) * m + c.channels * m + encode + k
    convolution = (stem + g * m + encode) * hr + (c.channels * m + encode) * lr
    neighbours = k * c.channels * hr
    if c.gate:
        parameters += c.channels + 1
        convolution += c.channels * lr
        neighbours += 2 * c.channels * hr
    return Cost(parameters, convolution, neighbours)


def _carafe(c: CARAFEConfig, lr: int, hr: int) -> Cost:
    """(C m + k^2 m r^2 K^2) LR + K^2 C HR."""
    k, m = c.kernel_size**2, c.compressed
    encode = m * c.encoder_kernel_size**2 * c.ratio**2 * k
    parameters = (c.channels + 1) * m + encode + c.ratio**2 * k
    return Cost(parameters, (c.channels * m + encode) * lr, k * c.channels * hr)


def _dysample(c: DySampleConfig, lr: int, hr: int) -> Cost:
    """2 g C HR of offsets (r^2 less in the pl style), and a sample of C channels."""
    inputs, outputs, places = c.channels, 2 * c.groups * c.ratio**2, lr
    if c.style == "pl":
        inputs, outputs, places = c.channels // c.ratio**2, 2 * c.groups, lr * c.ratio**2
    layers = 1 + int(c.dynamic_scope)
    return Cost(
        (layers * inputs + 1) * outputs,  # the scope has no bias
        layers * inputs * outputs * places,
        _BILINEAR * c.channels * hr,
    )


def _learned_bilateral(c: LearnedBilateralConfig, lr: int, hr: int) -> Cost:
    """Everything at HR: projections, K^2 similarities, the correcting net, reassembly."""
    k, e, g = c.kernel_size**2, c.embedding, c.guidance_channels
    project = g * e + e * e
    correct = (g + k) * k + k * k if c.correction else 0
    biases = 2 * e + (2 * k if c.correction else 0)
    neighbours = (k * (e + c.channels) + _BICUBIC * c.channels) * hr
    return Cost(2 + project + correct + biases, (project + correct) * hr, neighbours)


def _deconvolution(c: DeconvolutionConfig, lr: int, hr: int) -> Cost:
    """C^2 / groups (2 r)^2 LR."""
    taps = c.channels**2 // c.groups * (2 * c.ratio) ** 2
    return Cost(taps + c.channels, taps * lr, 0)


def _pixel_shuffle(c: PixelShuffleConfig, lr: int, hr: int) -> Cost:
    """C^2 r^2 k^2 LR."""
    taps = c.channels**2 * c.ratio**2 * c.kernel_size**2
    return Cost(taps + c.channels * c.ratio**2, taps * lr, 0)


def _indexnet(c: IndexNetConfig, lr: int, hr: int) -> Cost:
    """The index network at LR, and a product per channel at HR."""
    g, taps = c.guidance_channels, 16 if c.context else 4
    if c.kind == "hin":
        blocks, middle, out = 1, 2 * g, 4
    else:
        blocks, middle, out = 4, g, g
    if c.nonlinear:
        layers, norms = g * middle * taps + middle * out, 2 * middle
    else:
        layers, norms = g * out * taps, 0
    return Cost(blocks * (layers + norms), blocks * layers * lr, c.channels * hr)


def _a2u(c: A2UConfig, lr: int, hr: int) -> Cost:
    """Two dynamic k x k convolutions and their product at LR, K^2 C HR of reassembly."""
    k, g, taps = c.kernel_size**2, c.guidance_channels, c.encoder_kernel_size**2
    maps = 1 if c.shared else g
    parameters = 4 * g + 2 * (g + 1) * maps + 2 * (g + 1) * 4 * k
    # What makes the taps and the vector does not grow with the map; the down vector is the
    # encoder's.
    convolution = 2 * g * maps * taps + g * 4 * k + 2 * taps * g * lr
    return Cost(parameters, convolution, (g + 4 * k) * lr + k * c.channels * hr)


_FORMULAS: dict[type[Config], Callable[..., Cost]] = {
    ReSFUConfig: _resfu,
    SAPAConfig: _sapa,
    LDAAQUConfig: _lda_aqu,
    FADEConfig: _fade,
    CARAFEConfig: _carafe,
    DySampleConfig: _dysample,
    LearnedBilateralConfig: _learned_bilateral,
    DeconvolutionConfig: _deconvolution,
    PixelShuffleConfig: _pixel_shuffle,
    IndexNetConfig: _indexnet,
    A2UConfig: _a2u,
}
