"""The first N principal components of the features of a run, as the values that are kept.

The projection is affine per pixel and kernel weights sum to 1, so projecting the low-resolution
features and upsampling the N scores gives exactly the projection of the upsampled features.
(:mod:`fmupsample.draw.pca` makes colours; this is the plain PCA, for numbers.)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fmupsample.errors import UsageError
from fmupsample.fingerprint import fingerprint
from fmupsample.images.find import printable


@dataclass(frozen=True)
class Projection:
    """``scores = components @ (feature - mean)``.

    Attributes:
        mean: ``[C]`` float32.
        components: ``[N, C]`` float32, orthonormal rows, most variance first; the entry of the
            largest size in each row is positive.
        variance: ``[N]`` float32, of the scores over the tokens it was fitted on.
        total_variance: of all C channels together.
    """

    mean: Tensor
    components: Tensor
    variance: Tensor
    total_variance: float

    @property
    def explained(self) -> float:
        """Share of the variance that the components hold, 0..1."""
        return float(self.variance.sum()) / self.total_variance if self.total_variance > 0 else 1.0

    @property
    def fingerprint(self) -> str:
        """12 hex digits over the numbers."""
        return fingerprint({"mean": self.mean, "components": self.components})

    def apply(self, features: Tensor) -> Tensor:
        """``[C, h, w]`` (any device) -> scores, float32 ``[N, h, w]``."""
        mean, components = self.mean.to(features.device), self.components.to(features.device)
        return torch.einsum("nc,chw->nhw", components, features.float() - mean[:, None, None])

    def save(self, path: Path, meta: dict[str, str]) -> None:
        """Write a safetensors file, in place: the caller sees to a temporary name."""
        from safetensors.torch import save

        tensors = {
            "mean": self.mean,
            "components": self.components.contiguous(),
            "variance": self.variance.contiguous(),
        }
        path.write_bytes(save(tensors, {**meta, "total_variance": repr(self.total_variance)}))

    @classmethod
    def load(cls, path: Path) -> tuple[Projection, dict[str, str]]:
        """What :meth:`save` wrote.

        Raises:
            UsageError: it is not such a file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                meta = dict(file.metadata() or {})
                tensors = [file.get_tensor(k) for k in ("mean", "components", "variance")]
            total = float(meta.pop("total_variance"))
            mean, components, variance = (tensor.float() for tensor in tensors)
            if components.ndim != 2 or mean.shape != components.shape[1:]:
                raise ValueError("its tensors do not fit together")
            if variance.shape != components.shape[:1]:
                raise ValueError("its tensors do not fit together")
            if not all(torch.isfinite(t).all() for t in (mean, components, variance)):
                raise ValueError("it holds NaN or infinity")
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UsageError(
                f"{printable(path)} is not the PCA basis of an earlier run: move it away, or "
                "choose another output folder"
            ) from error
        return cls(mean, components, variance, total), meta


class ProjectionFit:
    """Collects features map by map; holds C x C numbers however many there are."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        # A shift close to the mean keeps the sums of squares well conditioned.
        self._shift: Tensor | None = None
        self._sum = torch.zeros(channels, dtype=torch.float64)
        self._products = torch.zeros(channels, channels, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """All tokens of ``[C, h, w]``; those with a NaN or infinity are left out."""
        tokens = features.detach().flatten(1).T.to("cpu", torch.float64)  # [h w, C]
        tokens = tokens[torch.isfinite(tokens).all(dim=1)]
        if not len(tokens):
            return
        if self._shift is None:
            self._shift = tokens.mean(dim=0)
        tokens = tokens - self._shift
        self.count += len(tokens)
        self._sum += tokens.sum(dim=0)
        self._products += tokens.T @ tokens

    def solve(self, components: int) -> Projection:
        """The projection onto ``components`` directions.

        Raises:
            UsageError: no tokens were added.
        """
        if self._shift is None:
            raise UsageError("--pca: none of the pictures gave features to compute a basis from")
        centre = self._sum / self.count
        covariance = self._products / self.count - torch.outer(centre, centre)
        values, vectors = torch.linalg.eigh(covariance)  # ascending
        values = values.flip(0).clamp_min(0)
        rows = vectors.T.flip(0)[:components]
        largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
        rows = rows * torch.where(largest < 0, -1.0, 1.0)
        return Projection(
            (self._shift + centre).float(),
            rows.float(),
            values[:components].float(),
            float(values.sum()),
        )
