"""The interface behind which every upsampler stands, learned or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmupsample.errors import ShapeError, UsageError
from fmupsample.layers.parts import InParts
from fmupsample.ops import reassemble, reassemble_at
from fmupsample.upsamplers.complexity import Cost, Size


class Upsampler(nn.Module):
    """Upsamples a low-resolution feature map, usually under the guidance of a larger map.

    A subclass that is linear in its values implements :meth:`kernels` and :meth:`reassemble` and
    inherits :meth:`forward`; the two halves let a caller map the values first (to PCA scores, class
    logits, ...) and reassemble the few resulting channels instead of all C.
    Others override :meth:`forward`.

    Attributes:
        name: the word that selects this method on the command line.
        needs_guidance: whether ``guidance`` must be given.
        guidance_is_image: guidance is the normalised picture ``[B, 3, H, W]`` (end-to-end form);
            otherwise any map with the channels the module was built for.
        fixed_ratio: the only ratio r it can do, or ``None`` for any ratio >= 1. Sizes that are not
            multiples of r come about when an encoder halves odd ones; they are allowed as long as
            ``ceil(H / r)`` is h.
        linear_in_value: whether :meth:`forward` is :meth:`kernels` and then :meth:`reassemble`, and
            weights sum to 1, so that any per-pixel affine map may be applied first.
        fuses_skip: whether the guidance is not only looked at, but flows into the result (the skip
            connection of a decoder).
        neighbours: how ``reassemble`` reads values: ``"fine"`` (bilinear samples) or ``"coarse"``
            (whole cells), K x K of them, as :func:`fmupsample.ops.reassemble` does; or ``None``
            for a way of its own, of which no compact file can be made.
        kernel_size: K, where ``neighbours`` says how; ``None`` where it depends on the grid (see
            :meth:`kernel_size_for`).
        bytes_per_pixel: about what ``kernels`` takes on its way, per output pixel.
        uses_ops: whether the work is done by the operators of :mod:`fmupsample.ops`, and so
            whether the compiled extension is of use.
        fingerprint: which numbers it holds, as results record it: the loader's word for a method
            without parameters, 12 hex digits of a head's; ``None`` for a module made in memory.
        late: fields of the configuration that count after training only (``None`` in training).
    """

    name: ClassVar[str]
    needs_guidance: ClassVar[bool] = False
    fixed_ratio: int | None = None
    linear_in_value: bool = True
    fuses_skip: bool = False
    neighbours: str | None = None
    kernel_size: int | None = None
    bytes_per_pixel: ClassVar[int] = 1200
    uses_ops: ClassVar[bool] = True
    guidance_is_image: bool = True
    fingerprint: str | None = None
    late: ClassVar[tuple[str, ...]] = ()

    def forward(
        self, x: Tensor, guidance: Tensor | None = None, *, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Upsample ``x`` ``[B, C, h, w]`` to ``[B, C, H, W]``, in the dtype of ``x``.

        Args:
            x: features, any floating dtype.
            guidance: ``[B, G, H, W]``; required where ``needs_guidance``.
            size: ``(H, W)`` of the output; by default the size of the guidance, or what the only
                ratio of the method gives.

        Raises:
            ShapeError: wrong ranks, batches that differ, guidance or size smaller than ``x``
                (the two arguments swapped?), or a missing guidance.
        """
        weights = self.kernels(x, guidance, size)
        return self.reassemble(weights, x)

    def kernels(
        self, x: Tensor, guidance: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Kernel weights ``[B, N, H, W]``, each pixel's N neighbour weights summing to 1.

        Methods whose neighbours are not on the grid return what makes them up (weights and
        positions, or a guide): to be passed on to :meth:`reassemble` as it is.
        """
        raise UsageError(f"{self.name} is not linear in its values: it has no kernel weights")

    def kernels_in_rows(
        self, x: Tensor, guidance: Tensor | InParts | None, size: tuple[int, int], pixels: int
    ) -> Iterator[Tensor]:
        """:meth:`kernels` in bands of rows ``[B, N, rows, W]`` from the top, in bounded memory.

        The same numbers up to rounding, without gradients. Methods that can do so work on about
        ``pixels`` output pixels at a time; this one makes all of them at once.
        """
        whole = guidance if guidance is None else guidance[...]
        yield torch.no_grad()(self.kernels)(x, whole, size)

    def reassemble(self, weights: Tensor, value: Tensor) -> Tensor:
        """Weighted neighbours of ``value`` ``[B, V, h, w]`` -> ``[B, V, H, W]``.

        ``value`` may be any map on the grid of the features that made ``weights``.
        """
        raise UsageError(f"{self.name} is not linear in its values: it has no kernel weights")

    def reassemble_at(self, weights: Tensor, value: Tensor, pixels: Tensor) -> Tensor:
        """Some pixels of one picture's :meth:`reassemble`: ``[n, V]``.

        Methods whose neighbours are those of :func:`fmupsample.ops.reassemble` override this with
        one that costs what the chosen pixels cost; here the whole map is made.

        Args:
            weights: ``[N, H, W]``, any floating dtype.
            value: ``[V, h, w]``.
            pixels: int64 ``[n]``, ``row * W + column`` of each.
        """
        whole = self.reassemble(weights[None].to(value.dtype), value[None])[0]
        return whole.flatten(1)[:, pixels].T

    def kernel_size_for(self, cells: tuple[int, int]) -> int | None:
        """K for maps on a grid of ``cells`` (h, w)."""
        return self.kernel_size

    def options(self) -> dict[str, Any]:
        """Return what, with the parameters, makes another one like it: for its head file."""
        config = getattr(self, "config", None)
        return {} if config is None else config.to_dict()

    def use_with(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Be told how the pictures given as guidance are normalised; most methods do not care.

        Args:
            mean, std: of a backbone, for RGB in 0..1.
        """

    def cost(self, channels: int, cells: Size, pixels: Size) -> Cost:
        """What one picture costs: features ``[channels, *cells]`` upsampled to ``pixels``."""
        parameters = sum(parameter.numel() for parameter in self.parameters())
        return Cost(parameters, *self.macs(channels, cells, pixels))

    def macs(self, channels: int, cells: Size, pixels: Size) -> tuple[int, int]:
        """Multiply-adds of :meth:`cost`: of layers with parameters, and of everything else."""
        raise UsageError(f"there is no formula for what {self.name} costs")

    def check(
        self, x: Tensor, guidance: Tensor | None, size: tuple[int, int] | None
    ) -> tuple[int, int]:
        """Validate the arguments of :meth:`forward` and return the output size ``(H, W)``."""
        if x.ndim != 4 or not x.is_floating_point():
            raise ShapeError(
                f"{self.name}: features must be a floating [B, C, h, w] tensor, "
                f"got {x.dtype} {list(x.shape)}"
            )
        h, w = x.shape[-2:]
        if h < 1 or w < 1:
            raise ShapeError(f"{self.name}: features {list(x.shape)} have no pixels")
        if guidance is None and self.needs_guidance:
            raise ShapeError(f"{self.name} needs a guidance map [B, G, H, W]; none was given")
        if guidance is None and size is None and self.fixed_ratio is not None:
            size = (h * self.fixed_ratio, w * self.fixed_ratio)
        if guidance is None and size is None:
            raise ShapeError(f"{self.name}: give a guidance map or size=(H, W)")
        if guidance is not None:
            self._check_guidance(x, guidance)
            size = size or (guidance.shape[-2], guidance.shape[-1])
        height, width = map(_number, size or ())
        if height < h or width < w:
            raise ShapeError(
                f"{self.name}: output size {height}x{width} is smaller than the features {h}x{w}; "
                "ratios below 1 are not upsampling"
            )
        ratio = self.fixed_ratio
        if ratio is not None and (-(-height // ratio), -(-width // ratio)) != (h, w):
            raise ShapeError(
                f"{self.name} upsamples exactly {ratio} times: features {h}x{w} give "
                f"{h * ratio}x{w * ratio}, not {height}x{width}"
            )
        return height, width

    def _check_guidance(self, x: Tensor, guidance: Tensor) -> None:
        if guidance.ndim != 4 or not guidance.is_floating_point():
            raise ShapeError(
                f"{self.name}: guidance must be a floating [B, G, H, W] tensor, "
                f"got {guidance.dtype} {list(guidance.shape)}"
            )
        if guidance.shape[0] != x.shape[0]:
            raise ShapeError(
                f"{self.name}: features have batch {x.shape[0]}, guidance {guidance.shape[0]}"
            )
        if guidance.shape[-2] < x.shape[-2] or guidance.shape[-1] < x.shape[-1]:
            raise ShapeError(
                f"{self.name}: guidance {list(guidance.shape)} is smaller than the features "
                f"{list(x.shape)}; the call is up(features, guidance) - are they swapped?"
            )


def _number(n: Any) -> Any:
    """A length as a number; one that an exported program leaves open is none to turn into one."""
    return n if isinstance(n, torch.SymInt) else int(n)


class NeighbourUpsampler(Upsampler):
    """Reassembles K x K neighbours as :func:`fmupsample.ops.reassemble` does.

    Whole cells around the one that a pixel lies in; bilinear samples where ``neighbours`` is
    ``"fine"``. Of a fixed ratio every cell has that many pixels, also where an odd size cuts the
    last ones.
    """

    def reassemble(self, weights: Tensor, value: Tensor) -> Tensor:
        height, width = weights.shape[2:]
        whole = self._uncut(weights, tuple(value.shape[2:]))
        out = reassemble(value, whole, fractional=self.neighbours == "fine")
        return out[:, :, :height, :width]

    def reassemble_at(self, weights: Tensor, value: Tensor, pixels: Tensor) -> Tensor:
        whole, width = self._uncut(weights, tuple(value.shape[1:])), weights.shape[2]
        pixels = pixels // width * whole.shape[2] + pixels % width
        return reassemble_at(value, whole, pixels, fractional=self.neighbours == "fine")

    def _uncut(self, weights: Tensor, cells: Sequence[int]) -> Tensor:
        """Weights ``[..., H, W]`` of whole cells: zeros where pixels were cut off."""
        if self.fixed_ratio is None:
            return weights
        missing = [n * self.fixed_ratio - m for n, m in zip(cells, weights.shape[-2:], strict=True)]
        return F.pad(weights, (0, missing[1], 0, missing[0])) if any(missing) else weights
