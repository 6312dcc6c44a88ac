"""Principal components of features as colours: a robust basis, its file, and the way to RGB.

A basis is affine: ``scores = components @ (feature - mean)``. Kernel weights sum to 1, so an
upsampler that is linear in its values may be given the three scores instead of all C channels and
the result is the same (projecting first, reassembling after).

Robust, because a few tokens of a vision transformer can be an order of magnitude longer than the
rest ("artefact" or register tokens): a plain PCA spends a component on them and all else turns
grey. Here the centre is a median, tokens far outside the usual distance from it are left out, and
the colour range comes from percentiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fmupsample.atomic import replacing
from fmupsample.errors import OutputError, ShapeError, UsageError
from fmupsample.fingerprint import fingerprint
from fmupsample.images.arrays import interleaved

FORMAT = "fmupsample-pca-basis"
FORMAT_VERSION = "1"

# Tokens farther from the centre than SOFT times the 90th percentile of that distance count less,
# beyond HARD times they do not count. Natural tokens stay within about 1.5 times; artefacts of the
# DINOv2 kind lie at 3 to 10 times and are at most a few percent, so the percentile is unharmed.
_SOFT, _HARD = 1.5, 2.5
# The usual range of a component: these percentiles of its scores.
_LOW_PERCENT, _HIGH_PERCENT = 1.0, 99.0
_SKEW = 0.6  # how far the middle of a component's range is moved to its median
# From scores to colours: slope of the curve; how far from grey (1: as far as RGB goes).
_CONTRAST, _CHROMA = 2.6, 0.82
_BLOCK = 2**15  # pixels
_LUMA = (0.299, 0.587, 0.114)
# A component whose range is below this share of the largest one is noise of a rank-deficient fit.
_FLAT = 1e-4


@dataclass(frozen=True)
class PCABasis:
    """Three directions in feature space and the range of their scores.

    Attributes:
        mean: ``[C]`` float32, the centre.
        components: ``[3, C]`` float32, orthonormal rows, most variance first; a row of zeros where
            the tokens have fewer than three dimensions.
        low, middle, high: ``[3]`` float32, the usual range of the scores (1st and 99th percentile)
            and what is drawn half bright, see :meth:`to_rgb`. All 0 for a component without range.
        explained: ``[3]`` float32, the share of the (robust) variance that each component holds.
        metadata: what the basis was made from (backbone, layer, ...); saved in the file's header.
    """

    mean: Tensor
    components: Tensor
    low: Tensor
    middle: Tensor
    high: Tensor
    explained: Tensor
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def channels(self) -> int:
        """C, the number of channels of the features that it projects."""
        return self.mean.shape[0]

    @cached_property
    def fingerprint(self) -> str:
        """12 hex digits over the numbers (not the metadata): equal colours, equal fingerprint."""
        names = ("mean", "components", "low", "middle", "high")
        return fingerprint({name: getattr(self, name) for name in names})

    @classmethod
    def fit(
        cls,
        tokens: Tensor,
        *,
        robust: bool = True,
        metadata: Mapping[str, str] | None = None,
    ) -> PCABasis:
        """The basis of ``tokens`` ``[N, C]`` (N >= 1, any floating dtype, any device).

        The same tokens give the same basis, signs included. Tokens with a NaN or infinity are left
        out. With fewer than four tokens, or constant ones, some components are zero.

        Args:
            tokens: one feature vector a row.
            robust: ``False`` gives the textbook PCA (mean centre, every token counts 1), with the
                same percentile range.
            metadata: kept with the basis and checked by :meth:`check`.

        Raises:
            ShapeError: ``tokens`` is not a floating ``[N, C]`` tensor with a finite row.
        """
        if tokens.ndim != 2 or not tokens.is_floating_point() or tokens.numel() == 0:
            raise ShapeError(
                "a PCA basis is fitted on floating tokens [N, C], "
                f"got {tokens.dtype} {list(tokens.shape)}"
            )
        tokens = tokens.detach().to("cpu", torch.float64)
        finite = torch.isfinite(tokens.abs().amax(dim=1))
        if not finite.any():
            raise ShapeError("none of the tokens is finite: there is nothing to fit a PCA basis on")
        if not finite.all():
            tokens = tokens[finite]
        weights = outlier_weights(tokens) if robust else torch.ones(len(tokens)).double()
        mean = (weights @ tokens) / weights.sum()
        centred = tokens - mean
        covariance = centred.T @ (centred * weights[:, None]) / weights.sum()
        values, vectors = torch.linalg.eigh(covariance)  # ascending
        components = _fixed_signs(vectors.T.flip(0)[:3])
        values = values.flip(0).clamp_min(0)
        total = float(values.sum())
        explained = values[:3] / total if total > 0 else torch.zeros(min(3, len(values))).double()

        kept = centred[weights > 0]
        scores = kept @ components.T
        percents = torch.tensor([_LOW_PERCENT, 50, _HIGH_PERCENT], dtype=torch.float64) / 100
        low, median, high = torch.quantile(_thinned(scores), percents, dim=0)
        # Where most tokens lie at one end, move the middle towards them: else most of a picture
        # would be drawn in one colour.
        middle = median * _SKEW + (low + high) / 2 * (1 - _SKEW)
        # Rounding noise of the centre sets the floor below which a spread means nothing.
        span = high - low
        floor = max(float(span.max()) * _FLAT, 1e-6 * float(mean.abs().max()), 1e-12)
        flat = span <= floor
        components = torch.where(flat[:, None], torch.zeros_like(components), components)
        low, middle, high = (torch.where(flat, 0.0, t) for t in (low, middle, high))
        explained = torch.where(flat, 0.0, explained)

        def three(t: Tensor) -> Tensor:  # fewer than three channels: pad with empty components
            padded = t.new_zeros(3, *t.shape[1:])
            padded[: len(t)] = t
            return padded.float()

        parts = (components, low, middle, high, explained)
        return cls(mean.float(), *map(three, parts), dict(metadata or {}))

    def apply(self, features: Tensor) -> Tensor:
        """Scores of a map: ``[C, h, w]`` -> ``[3, h, w]``, or with a batch in front.

        float32, on the device of ``features``. Not clipped: give it to an upsampler, then to
        :meth:`to_rgb`.

        Raises:
            ShapeError: the map has another number of channels.
        """
        if features.ndim not in (3, 4) or features.shape[-3] != self.channels:
            raise ShapeError(
                f"this PCA basis is for {self.channels} channels; got features "
                f"{list(features.shape)}"
            )
        mean, components = self.mean.to(features.device), self.components.to(features.device)
        centred = features.float() - mean[:, None, None]
        return torch.einsum("kc,...chw->...khw", components, centred)

    def to_rgb(self, scores: Tensor) -> np.ndarray:
        """Scores ``[3, H, W]`` as a picture: uint8 ``[H, W, 3]``.

        Each component drives one of red, green and blue along a smooth curve, which passes one half
        at ``middle``, 7 and 93 percent at ``low`` and ``high``, and is level beyond them: nothing
        is cut off hard. Colours are then drawn a little together, away from neon. A score that is
        not finite is drawn in the middle.
        """
        device, shape = scores.device, scores.shape
        low, middle, high = (
            t.to(device, torch.float32)[:, None] for t in (self.low, self.middle, self.high)
        )
        # Per unit of the score; a side without any width drives nothing.
        below, above = (
            torch.where(side > 0, _CONTRAST / side, 0.0) for side in (middle - low, high - middle)
        )
        luma = 255 * (1 - _CHROMA) * torch.tensor(_LUMA, device=device)
        scores = scores.reshape(3, -1)
        rgb = torch.empty_like(scores, dtype=torch.uint8)
        # In place and a few at a time, which stay in the processor's cache.
        for part, out in zip(scores.split(_BLOCK, 1), rgb.split(_BLOCK, 1), strict=True):
            place = part.float() - middle
            more = place.clamp_min(0).mul_(above)  # in fewer passes than a choice of the factor
            place.clamp_max_(0).mul_(below).add_(more)
            place.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).sigmoid_()
            out.copy_((place * (255 * _CHROMA)).add_(luma @ place).round_())
        return interleaved(rgb.reshape(shape))

    def save(self, path: str | Path) -> None:
        """Write ``path`` (safetensors, numbers in float32, :attr:`metadata` in the header).

        Raises:
            OutputError: it cannot be written.
        """
        from safetensors.torch import save

        tensors = {
            "mean": self.mean,
            "components": self.components,
            "low": self.low,
            "middle": self.middle,
            "high": self.high,
            "explained": self.explained,
        }
        header = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **{key: str(value) for key, value in self.metadata.items()},
        }
        path = Path(path)
        try:
            with replacing(path) as temporary:
                temporary.write_bytes(save({k: v.contiguous() for k, v in tensors.items()}, header))
        except OSError as error:
            raise OutputError(f"cannot write the PCA basis {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | Path) -> PCABasis:
        """Read a file made by :meth:`save`.

        Raises:
            UsageError: no such file, or not a PCA basis.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise UsageError(f"there is no PCA basis at {path}; expected a file basis.safetensors")
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                metadata = dict(file.metadata() or {})
                tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
            raise UsageError(f"{path} is not a PCA basis: {error}") from error
        names = ("mean", "components", "low", "middle", "high", "explained")
        missing = [name for name in names if name not in tensors]
        if metadata.pop("format", None) != FORMAT or missing:
            raise UsageError(
                f"{path} is not a PCA basis: expected the basis.safetensors that "
                "'fmupsample visualize' leaves beside its pictures"
            )
        version = metadata.pop("format_version", "?")
        if version != FORMAT_VERSION:
            raise UsageError(
                f"{path} is a PCA basis of format {version}; this version reads {FORMAT_VERSION}"
            )
        basis = cls(*(tensors[name] for name in names), metadata)
        if basis.mean.ndim != 1 or basis.components.shape != (3, len(basis.mean)):
            raise UsageError(f"{path} is a damaged PCA basis: its tensors do not fit together")
        if any(tensors[name].shape != (3,) for name in ("low", "middle", "high", "explained")):
            raise UsageError(f"{path} is a damaged PCA basis: its tensors do not fit together")
        if not all(torch.isfinite(tensors[name]).all() for name in names):
            raise UsageError(f"{path} is a damaged PCA basis: it holds NaN or infinity")
        return basis

    def check(self, *, backbone: str, layer: str | int, channels: int, where: str = "") -> None:
        """Refuse features of another backbone or layer than those the basis was made from.

        Raises:
            UsageError: naming both sides.
        """
        where = where or "the PCA basis"
        if channels != self.channels:
            raise UsageError(
                f"{where} is for {self.channels} channels"
                f"{self._origin()}, but {backbone} gives {channels}"
            )
        made_with = self.metadata.get("backbone", backbone)
        made_at = self.metadata.get("layer", str(layer))
        if made_with != backbone or made_at != str(layer):
            raise UsageError(
                f"{where} was made from {made_with} layer {made_at}, but this run uses {backbone} "
                f"layer {layer}; give the same backbone and layer, or leave --basis out"
            )

    def _origin(self) -> str:
        made_with = self.metadata.get("backbone")
        return f" ({made_with})" if made_with else ""


def outlier_weights(tokens: Tensor) -> Tensor:
    """Weight in 0..1 of each row of ``tokens`` ``[N, C]`` float64: 0 for what lies far outside.

    The distance from the coordinate-wise median is compared with its own 90th percentile; weights
    fall linearly from 1 to 0 between 1.5 and 2.5 times that (Raymaekers and Rousseeuw 2019 call
    such a radial function "linearly redescending"). All 1 when most tokens are the same.
    """
    radius = (tokens - tokens.median(dim=0).values).norm(dim=1)
    usual = float(torch.quantile(_thinned(radius), 0.90))
    if usual <= 1e-6 * float(radius.max()):  # nearly all tokens equal: the rest is all there is
        return torch.ones_like(radius)
    return ((_HARD - radius / usual) / (_HARD - _SOFT)).clamp(0, 1)


def sample_tokens(features: Tensor, count: int) -> Tensor:
    """At most ``count`` tokens of ``features`` ``[C, h, w]``, spread evenly: ``[n, C]``, n >= 1.

    Deterministic; a Weyl sequence on the token index, so that no grid column is preferred.
    """
    tokens = features.flatten(1).T
    if count >= len(tokens):
        return tokens
    golden = (5**0.5 - 1) / 2
    order = torch.argsort(torch.frac(torch.arange(len(tokens), dtype=torch.float64) * golden))
    return tokens[order[: max(count, 1)].sort().values.to(tokens.device)]


def _fixed_signs(components: Tensor) -> Tensor:
    """Turn each row so that the sum of its cubes is positive.

    An eigenvector's sign is arbitrary. The cubes let the large loadings decide, smoothly: adding
    a picture to a run does not flip a colour, as it can where the largest one alone decides.
    """
    cubes = (components**3).sum(dim=1)
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))[:, 0]
    decide = torch.where(cubes.abs() > 1e-9, cubes, largest)
    return components * torch.where(decide < 0, -1.0, 1.0)[:, None]


def _thinned(values: Tensor, limit: int = 2_000_000) -> Tensor:
    """Every n-th row, for ``torch.quantile`` refuses more than 16 million numbers."""
    return values[:: max(1, -(-values.numel() // limit))]
