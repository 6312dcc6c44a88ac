"""What makes one ReSFU differ from another."""

from __future__ import annotations

from dataclasses import dataclass

from fmupsample.errors import UsageError
from fmupsample.upsamplers.config import Config


@dataclass(frozen=True)
class ReSFUConfig(Config):
    """Shape and switches of a ReSFU; the defaults are the paper's.

    The switches exist for ablation: each turns one part of the method into its plain counterpart.
    """

    guidance_channels: int = 16  # G, of the guidance map (of the stem's output, where there is one)
    stem: bool = True  # make the guidance from the picture (end-to-end form); else it is given
    kernel_size: int = 3  # K: K x K neighbours per pixel, odd
    embedding: int = 32  # channels of queries and keys
    middle: int = 128  # channels of the paired central difference convolution
    groups: int = 4  # of that convolution and of the 1x1 after it
    norm_groups: int = 8  # of the GroupNorms on queries, keys and middle channels
    # What makes keys of the features. "learned": a 1x1 convolution, as in the paper. "projected": a
    # random orthogonal projection of standardised features, which prefers no channel. With it
    # channels may be 0, any number: a new projection at every step of training, one of a fixed seed
    # in use. For a given number of channels the projection is where training starts.
    keys: str = "learned"
    semantic: bool = True  # use the semantic pair (keys from the features)
    detail: bool = True  # use the detail pair (keys from the guidance)
    align: bool = True  # align queries with keys: guided filter and Gaussian
    # "pcdc"; "inner": the plain inner product; "distance": of whole cells, for neighbours="coarse".
    similarity: str = "pcdc"
    neighbours: str = "fine"  # "fine": bilinear samples; "coarse": whole cells
    # A bilateral prior on whole cells, for neighbours="coarse"; none, as in the paper, by default.
    # Sigmas of Gaussians on the distance of a pixel from a cell's centre, in cells (without it
    # whole cells leave a mosaic), and on how its colour differs from the cell's mean, in units of
    # the picture. Taper: cells count less with their distance, down to nothing where they leave the
    # K x K, so that with similarity="distance" there are no seams.
    taper: bool = False
    sigma_space: float | None = None
    sigma_range: float | None = None
    guided_radius: int = 8  # of the guided filter, in pixels
    guided_eps: float = 1e-3

    def __post_init__(self) -> None:
        if not (self.semantic or self.detail):
            raise UsageError("ReSFU needs the semantic pair, the detail pair, or both")
        self.require_odd("kernel_size")
        if not 0 <= self.guided_radius <= 1024 or not 0 <= self.guided_eps < float("inf"):
            raise UsageError(
                f"ReSFU: guided_radius={self.guided_radius} must be from 0 to 1024 and guided_eps="
                f"{self.guided_eps} at least 0"
            )
        self.require_one_of("similarity", ("pcdc", "inner", "distance"))
        self.require_one_of("neighbours", ("fine", "coarse"))
        self.require_one_of("keys", ("learned", "projected"))
        if self.channels < 0 or (self.channels == 0 and self.keys != "projected"):
            raise UsageError("ReSFU: channels=0, any number, is for keys='projected'")
        for name in ("sigma_space", "sigma_range"):
            if getattr(self, name) is not None:
                self.require_positive(name)
        for name, plain in (
            ("sigma_space", None), ("sigma_range", None), ("taper", False),
        ):  # fmt: skip
            if getattr(self, name) != plain and self.neighbours != "coarse":
                raise UsageError(f"ReSFU: {name} is for neighbours='coarse'")
        if self.similarity == "distance" and self.neighbours != "coarse":
            raise UsageError("ReSFU: similarity='distance' is for neighbours='coarse'")
        if self.sigma_range is not None and not self.stem:
            raise UsageError("ReSFU: sigma_range is for heads that see the picture (stem=True)")
        for name in ("embedding", "middle"):
            for divisor in (self.groups, self.norm_groups):
                if getattr(self, name) % divisor:
                    raise UsageError(
                        f"ReSFU: {name}={getattr(self, name)} must be a multiple of groups="
                        f"{self.groups} and of norm_groups={self.norm_groups}"
                    )


@dataclass(frozen=True)
class UniversalReSFUConfig(ReSFUConfig):
    """Of the form that takes the features of any backbone."""

    channels: int = 0
    keys: str = "projected"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels or self.keys != "projected":
            raise UsageError(
                "a universal ReSFU takes any number of channels: channels must be 0, keys projected"
            )

    def specialised(self, channels: int) -> ReSFUConfig:
        """The same for features of so many channels."""
        return ReSFUConfig(**{**self.to_dict(), "channels": channels})
