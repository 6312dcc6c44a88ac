"""What ``extract`` is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fmupsample.errors import UsageError
from fmupsample.formats.files import COMPACT, check_format
from fmupsample.formats.layout import WEIGHT_BITS
from fmupsample.images.size import check_output_size
from fmupsample.number_formats import number_format
from fmupsample.pipeline import Pipeline


@dataclass(frozen=True)
class ExtractOptions:
    """What is written for each image.

    Attributes:
        format: ``"safetensors"``, ``"npy"``, ``"pt"``, or ``"compact"``: low-resolution values and
            kernel weights, of which :func:`fmupsample.open` makes the map.
        dtype: ``"fp32"``, ``"fp16"`` or ``"bf16"``, of the numbers in the file.
        weight_bits: of kernel weights in compact files: 8, 16 or 32.
        output_size: ``"image"``, ``"original"``, ``"HxW"`` or ``"x4"``.
        tokens_only: the low-resolution features, nothing upsampled.
        pca: keep this many principal components instead of all channels.
        global_vector: keep a vector of the whole picture beside the map, see
            :meth:`.Backbone.forward`.
        shard_size: write tar files of so many images each, see :mod:`fmupsample.runs.shards`;
            ``None``: a file an image.
    """

    format: str = "safetensors"
    dtype: str = "fp16"
    output_size: str = "image"
    tokens_only: bool = False
    pca: int | None = None
    weight_bits: int = 16
    shard_size: int | None = None
    global_vector: bool = False

    def checked(self, pipeline: Pipeline) -> ExtractOptions:
        """The same in normal form.

        Raises:
            UsageError: unknown words, or a combination that cannot be.
        """
        dtype = number_format(self.dtype)
        check_format(self.format, dtype)
        size = check_output_size(self.output_size)
        channels = pipeline.backbone.channels
        if self.pca is not None and not 1 <= self.pca <= channels:
            raise UsageError(
                f"--pca {self.pca} is not possible: {pipeline.backbone.name} has {channels} "
                f"channels, so give 1 to {channels}"
            )
        if self.tokens_only and size != "image":
            raise UsageError("--tokens-only and --output-size exclude each other")
        if not self.tokens_only and pipeline.upsampler is None:
            raise UsageError("no upsampler was given: name one, or ask for --tokens-only")
        if self.format == COMPACT:
            self._check_compact(pipeline)
        if self.global_vector:
            if self.format == "npy":
                raise UsageError("npy files hold the map alone: use --format safetensors with "
                                 "--global")  # fmt: skip
            _ = pipeline.backbone.global_channels  # which raises where there is none
        if self.shard_size is not None:
            if self.shard_size < 1:
                raise UsageError(f"a shard of {self.shard_size} pictures is not possible")
            if self.format == "pt":
                raise UsageError(
                    "shards hold no pt files: use --format safetensors, compact or npy"
                )
        return replace(self, output_size=size, dtype=dtype)

    def _check_compact(self, pipeline: Pipeline) -> None:
        if self.tokens_only:
            raise UsageError("--tokens-only has no kernel weights to store: leave one of it and "
                             "--format compact away")  # fmt: skip
        if self.weight_bits not in WEIGHT_BITS:
            raise UsageError(f"--weight-bits {self.weight_bits} is not possible: use 8, 16 or 32")
        upsampler = pipeline.upsampler
        if not upsampler.linear_in_value or upsampler.neighbours is None:
            raise UsageError(
                f"upsampler {upsampler.name} has no kernel weights that a compact file could hold: "
                "leave --format compact away (whole maps), or name another upsampler"
            )
