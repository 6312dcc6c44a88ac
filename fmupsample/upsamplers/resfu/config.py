"""What makes one ReSFU differ from another."""

from __future__ import annotations

from dataclasses import dataclass

from fmupsample.errors import UsageError
from fmupsample.upsamplers.aligned.config import AlignedConfig


@dataclass(frozen=True)
class ReSFUConfig(AlignedConfig):
    """Shape and switches of a ReSFU; the defaults are the paper's.

    The switches exist for ablation: each turns one part of the method into its plain counterpart.
    """

    stem: bool = True  # make the guidance from the picture (end-to-end form); else it is given
    middle: int = 128  # channels of the paired central difference convolution
    groups: int = 4  # of that convolution and of the 1x1 after it
    similarity: str = "pcdc"  # paired central differences; "inner": the plain inner product
    neighbours: str = "fine"  # "fine": bilinear samples; "coarse": whole cells

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_one_of("similarity", ("pcdc", "inner"))
        self.require_one_of("neighbours", ("fine", "coarse"))
        if self.channels < 1:
            raise UsageError(f"ReSFUConfig: channels must be 1 or more, not {self.channels}")
        self.require_multiple("embedding", "groups")
        self.require_multiple("middle", "groups")
        self.require_multiple("middle", "norm_groups")
