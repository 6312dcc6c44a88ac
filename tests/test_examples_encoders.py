"""The examples' upsamplers of encoder-decoders, each against its definition written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from family import decoders
from reference.neighbours import gathered
from test_operators import EXACT, maps, renamed, scrambled, softmax

from fmupsample.errors import ShapeError, UsageError
from fmupsample.upsamplers import build_for_decoder, load_official

A2U, A2UConfig = decoders.A2U, decoders.A2UConfig
IndexNet, IndexNetConfig = decoders.IndexNet, decoders.IndexNetConfig
MaxUnpooling = decoders.MaxUnpooling
a2u, indexnet = decoders.a2u, decoders.indexnet


@pytest.mark.parametrize("nonlinear", [False, True])
@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("kind", ["hin", "m2o"])
def test_indexnet(kind, context, nonlinear):
    up = scrambled(IndexNet(IndexNetConfig(4, kind=kind, context=context, nonlinear=nonlinear)))
    encoder, x = maps((2, 4, 6, 8), (2, 4, 3, 4))
    kernel = 4 if context else 2

    def predicted(block):
        found = F.conv2d(encoder, block[0].weight, stride=2, padding=int(context))
        if nonlinear:
            found = (found / (1 + 1e-5) ** 0.5 * block[1].weight[:, None, None]) + block[1].bias[
                :, None, None
            ]
            found = F.conv2d(found.clamp(0, 6), block[3].weight)
        return found

    assert up.blocks[0][0].kernel_size == (kernel, kernel)
    blocks = [predicted(block) for block in up.blocks]
    each = blocks[0][:, None] if kind == "hin" else torch.stack(blocks, 2)  # [B, 1 or C, 4, h, w]
    each = each.expand(2, 4, 4, 3, 4).sigmoid()
    pooled, indices = up.downsample(encoder)
    expected = torch.zeros(2, 4, 6, 8).double()
    low = torch.zeros(2, 4, 3, 4).double()
    for place in range(4):
        i, j = divmod(place, 2)
        expected[:, :, i::2, j::2] = each[:, :, place] * x
        low += each.softmax(2)[:, :, place] * encoder[:, :, i::2, j::2]
    torch.testing.assert_close(pooled, low, **EXACT)
    torch.testing.assert_close(up.upsample(x, indices), expected, **EXACT)
    torch.testing.assert_close(up(x, encoder), expected, **EXACT)
    names = {f"blocks.{n}": f"indexnet{n + 1}" if kind == "m2o" else "indexnet" for n in range(4)}
    again = indexnet.load_official(renamed(up, names))
    torch.testing.assert_close(again(x, encoder), expected, **EXACT)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("border", ["masked", "zeros"])
def test_a2u(shared, border):
    up = scrambled(A2U(A2UConfig(6, 4, shared=shared, border=border)))
    encoder, x = maps((2, 4, 8, 10), (2, 6, 4, 5))
    affinity = []
    for one in encoder:  # each sample has convolutions of its own
        sides = []
        for layer, norm in ((up.taps_u, up.norm_u), (up.taps_v, up.norm_v)):
            taps = layer(F.adaptive_avg_pool2d(one[None], 5)).expand(1, 4, 5, 5)
            found = F.conv2d(one[None], taps.transpose(0, 1), stride=2, padding=2, groups=4)
            sides.append(F.leaky_relu(norm(found)))
        affinity.append((sides[0] * sides[1]).sum(1) / 2)
    affinity = torch.stack(affinity)  # [B, 1, 4, 5]
    mean = encoder.mean((2, 3), keepdim=True)
    scores = F.pixel_shuffle(up.up_vector(mean) * affinity, 2).sigmoid()
    values, there = gathered(x, (8, 10), 3)
    weights = softmax(scores, there, border)
    expected = (values * weights[:, None]).sum(2)
    torch.testing.assert_close(up(x, encoder), expected, **EXACT)
    pooled, again = up.downsample(encoder)
    torch.testing.assert_close(again, weights, **EXACT)
    # Six pixels wide windows around each block of two.
    around = F.pad(encoder, (2, 2, 2, 2))
    inside = F.pad(torch.ones_like(encoder[:, :1]), (2, 2, 2, 2))
    total, sums = torch.zeros_like(pooled), 0
    shares = (up.down_vector(mean) * affinity).exp()
    for n in range(36):
        i, j = divmod(n, 6)
        crop = (..., slice(i, i + 8, 2), slice(j, j + 10, 2))
        share = shares[:, n : n + 1] * (inside[crop] if border == "masked" else 1)
        total, sums = total + share * around[crop], sums + share
    torch.testing.assert_close(pooled, total / sums, **EXACT)
    names = {
        "norm_u": "bnu.0", "norm_v": "bnv.0", "up_vector": "bconv_UP.1",
        "down_vector": "bconv_DP.1", "taps_u": "bconv_U.1", "taps_v": "bconv_V.1",
    }  # fmt: skip
    official = a2u.load_official(renamed(up, names), channels=6)
    if border == "zeros":
        torch.testing.assert_close(official(x, encoder), expected, **EXACT)


@pytest.mark.parametrize("size", [(6, 8), (5, 7)])
def test_max_unpooling_is_that_of_torch(size):
    encoder, (h, w) = maps((2, 4, *size))[0], (3, 4)
    up, x = MaxUnpooling(), maps((2, 4, h, w))[0]
    pooled, places = up.downsample(encoder)
    assert pooled.shape == (2, 4, 3, 4)
    out = up.upsample(x, places, size)
    torch.testing.assert_close(up(x, encoder), out, **EXACT)
    assert ((out != 0).sum((2, 3)) == 12).all()
    torch.testing.assert_close(
        up.downsample(up.upsample(pooled.exp(), places, size))[0], pooled.exp()
    )
    if size == (6, 8):
        torch.testing.assert_close(out, F.max_unpool2d(x, places, 2), **EXACT)
    with pytest.raises(ShapeError, match="output's size"):
        up(x, encoder, size=(6, 7))


@pytest.mark.parametrize("size", [(7, 9), (8, 9), (6, 10)])
def test_an_encoder_and_its_decoder_fit_at_odd_sizes(size):
    (encoder,) = maps((1, 4, *size))
    for up in (scrambled(IndexNet(IndexNetConfig(4))), scrambled(A2U(A2UConfig(4)))):
        low, weights = up.downsample(encoder)
        assert low.shape[2:] == tuple(-(-n // 2) for n in size)
        back = (
            up.upsample(low, weights) if isinstance(up, IndexNet) else up.reassemble(weights, low)
        )
        assert back.shape == encoder.shape
        torch.testing.assert_close(back, up(low, encoder), **EXACT)


@pytest.mark.parametrize("name", decoders.ENCODER_UPSAMPLERS)
def test_the_library_says_where_they_are(name):
    for asked in (lambda: build_for_decoder(name, 8, 8), lambda: load_official(name, {})):
        with pytest.raises(UsageError, match=f"{name} is a part .* examples/decoders"):
            asked()
