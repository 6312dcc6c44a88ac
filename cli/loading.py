"""From the options of a command line to the models it asks for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fmupsample.errors import UsageError
from fmupsample_cli.progress import BuildLine, note

if TYPE_CHECKING:
    import torch

    from fmupsample.backbones import Backbone
    from fmupsample.images import Source
    from fmupsample.ops.backend import Choice
    from fmupsample.pipeline import Pipeline
    from fmupsample.upsamplers.base import Upsampler
    from fmupsample_cli.groups import PipelineOptions


def load_models(
    backbone: str = "embedded",
    layer: str | int | None = None,
    weights: Path | None = None,
    upsampler: str | None = None,
    head: Path | None = None,
    device: str | torch.device = "auto",
    *,
    image_size: tuple[int, int] | None = None,
    views: int = 1,
    quiet: bool = False,
    fit_on: Sequence[Source] | None = None,
) -> tuple[Backbone, Upsampler]:
    """Load what ``--backbone --layer --backbone-weights --upsampler --head`` name, on ``device``.

    Args:
        image_size: ``(H, W)`` when ``--image-size HxW`` was given: models that are built for one
            size are then built for this one.
        views: in how many the backbone sees each picture.
        quiet: do not say on standard error which models are used.
        fit_on: pictures to train a head on if there is none for this backbone.

    Raises:
        UsageError: both ``upsampler`` and ``head``.
        BackboneError, HeadError: something that is named does not exist or does not fit.
    """
    if upsampler is not None and head is not None:
        raise UsageError("--head and --upsampler exclude each other; give one of them")
    # Here and not at the top: these import torch and timm, which takes seconds.
    from fmupsample.backbones import load_backbone
    from fmupsample.distributed import own_device

    place = own_device(device)
    if head is not None and layer is None:
        from fmupsample.pipeline.opening import layer_of_head

        layer = layer_of_head(head, backbone)
    model = load_backbone(
        backbone, layer=layer, weights=weights, image_size=image_size, views=views
    )
    from fmupsample.upsamplers import load_upsampler
    from fmupsample.upsamplers.registry import current_name

    upsampler = None if upsampler is None else current_name(upsampler)

    if fit_on is not None and head is None:
        _fit_head(model, upsampler, fit_on, place, quiet)
    method = load_upsampler(model, head if head is not None else upsampler)
    origin = f" from {weights}" if weights is not None else ""
    note(
        f"backbone {model.name}{origin}, layer {model.layer}, {model.channels} channels per "
        f"{model.stride[0]:.4g}x{model.stride[1]:.4g} pixels; upsampler {method.name}; on {place}",
        quiet=quiet,
    )
    if views > 1:
        note(f"{views} views: {views} passes of the backbone for every picture", quiet=quiet)
    return model.to(place), method.to(place).eval()


def _fit_head(
    model: Backbone,
    upsampler: str | None,
    pictures: Sequence[Source],
    place: torch.device,
    quiet: bool,
) -> None:
    """Train a head for ``model`` and keep it, unless there is one."""
    from fmupsample.training.config import TrainConfig
    from fmupsample.training.fit import fit_head
    from fmupsample.upsamplers.loading import find_head
    from fmupsample.upsamplers.registry import learned_names
    from fmupsample_cli.progress import RichProgress, warn

    if upsampler is not None and upsampler not in learned_names():
        raise UsageError(f"--fit-head trains a head; --upsampler {upsampler} has none")
    if find_head(model, upsampler) is not None:
        return
    with RichProgress(quiet=quiet, unit="steps") as progress:
        report = fit_head(
            model,
            pictures,
            upsampler or TrainConfig.upsampler,
            device=place,
            progress=progress,
            say=lambda message: note(message, quiet=quiet),
        )
    if report is None:  # another run has trained it meanwhile
        return
    note(f"the head is kept in {report.output} for later runs", quiet=quiet)
    if report.score is not None and not report.score.better:
        warn(
            f"the head is no better than bilinear interpolation on {report.held_out} held-out "
            "pictures; `fmupsample train` with more pictures or --steps may help"
        )


def open_pipeline(
    options: PipelineOptions, *, quiet: bool, fit_on: Sequence[Source] | None = None
) -> Pipeline:
    """:func:`load_models`, in a pipeline with the options that commands on pictures share."""
    from fmupsample.distributed import own_device
    from fmupsample.images.size import ImageSize
    from fmupsample.memory import parse_memory
    from fmupsample.ops.backend import check_backend, set_backend
    from fmupsample.pipeline import Pipeline

    size = None if options.image_size is None else ImageSize.parse(options.image_size)
    allowed = None if options.max_memory is None else parse_memory(options.max_memory)
    set_backend(options.backend.value)
    place = own_device(options.device)
    check_backend(place)
    # Pillow's remarks on odd files would scribble over the progress bar; what matters is reported.
    warnings.filterwarnings("ignore", module="PIL")
    fitting = {} if fit_on is None else {"fit_on": fit_on}
    model, method = load_models(
        options.backbone, options.layer, options.backbone_weights, options.upsampler, options.head,
        place, image_size=size.exact if size else None, views=options.views, quiet=quiet, **fitting,
    )  # fmt: skip
    pipeline = Pipeline(
        model,
        method,
        image_size=size,
        fit=options.fit.value,
        device=place,
        precision=options.precision.value,
        batch_size=options.batch_size,
        workers=options.workers,
        window=options.window,
        max_memory=allowed,
    )
    # Now, where a minute of compiling can be shown, and not under the bar of the run.
    with BuildLine(quiet=quiet) as line:
        choice = used_backend(pipeline, line)
    if choice.reason is not None:
        note(f"plain PyTorch is used on {pipeline.device}: {choice.reason}", quiet=quiet)
    return pipeline


def used_backend(pipeline: Pipeline, progress: BuildLine | None = None) -> Choice:
    """What computes the operators of ``pipeline``; plain PyTorch if its upsampler has none."""
    from fmupsample.ops.backend import PLAIN, prepare

    upsampler = pipeline.upsampler
    if upsampler is None or not upsampler.uses_ops:
        return PLAIN
    return prepare(pipeline.device, progress)


def backend_text(choice: Choice) -> str:
    """For the table at the end of a run."""
    if choice.name == "cuda":
        return "cuda, the compiled extension"
    return "torch, plain PyTorch" + (f" ({choice.reason})" if choice.reason else "")
