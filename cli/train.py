"""``fmupsample train``: a head for a frozen backbone, from pictures, without labels."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmupsample.upsamplers.registry import any_backbone_names, current_name
from fmupsample_cli import options as o
from fmupsample_cli import train_options as t

if TYPE_CHECKING:
    from fmupsample.backbones import Backbone
    from fmupsample.training.config import TrainConfig
    from fmupsample.training.report import TrainReport


def train(
    images: o.Images = None,
    output: t.HeadOutput = ...,
    list_file: o.ListFile = None,
    backbone: o.BackboneName = "embedded",
    layer: o.Layer = None,
    backbone_weights: o.BackboneWeights = None,
    views: o.Views = 1,
    also: t.Also = None,
    upsampler: t.Upsampler = None,
    start_from: t.StartFrom = None,
    image_size: t.CropSize = None,
    val: t.Validation = None,
    masks: t.Masks = None,
    steps: t.Steps = None,
    batch_size: t.BatchSize = None,
    lr: t.LearningRate = None,
    seed: t.Seed = None,
    objective: t.ObjectiveOption = None,
    config: t.MoreOptions = None,
    resume: t.Resume = False,
    work: t.Work = None,
    overwrite: t.Overwrite = False,
    device: o.Device = "auto",
    backend: o.Backend = o.BackendName.auto,
    precision: t.Precision = None,
    workers: o.Workers = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Train an upsampler head for a frozen backbone on your own pictures, without labels.

    Features of a crop, upsampled, should agree with what the backbone says about the same crop
    enlarged, and with the edges of the picture. Some pictures are held out; the weights that do
    best on them are kept and compared with bilinear interpolation.

        fmupsample train photos/ -o head.safetensors --backbone dinov2-s

        fmupsample extract photos/ -o features/ --backbone dinov2-s --head head.safetensors

    Ctrl-C writes a checkpoint; the same command with --resume goes on. Several GPUs:

        torchrun --nproc-per-node 4 -m fmupsample train photos/ -o head.safetensors
    """
    from fmupsample.distributed import leads
    from fmupsample.images import find_images
    from fmupsample_cli.progress import RichProgress, note, warn

    # What cannot work is said before torch and the models are loaded.
    find = {"exclude": [work or output.with_name(f"{output.name}.train")], "warn": warn}
    sources = find_images(images or [], list_file=list_file, **find)
    validation = find_images(val, **find) if val else []

    from fmupsample.training.checkpoint import NAME
    from fmupsample.training.config import parse_objective
    from fmupsample.training.run import train as run
    from fmupsample.training.work import work_folder

    mask_folders = [t.parse_masks(text) for text in masks or ()]
    given = {
        "upsampler": upsampler,
        "image_sizes": None if image_size is None else t.parse_sizes(image_size),
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "objective": None if objective is None else parse_objective(objective),
        "precision": None if precision is None else precision.value,
    }
    wanted = _options(given, config, bool(mask_folders))
    quiet = quiet or not leads()
    first = {"name": backbone, "layer": layer, "weights": backbone_weights}
    several = [first, *map(t.parse_backbone, also or ())]
    _prepare(backend.value, device, quiet)
    models = _models(several, wanted, views)
    try:
        with RichProgress(quiet=quiet, unit="steps") as progress:
            report = run(
                models,
                sources,
                output,
                wanted,
                validation=validation,
                masks=mask_folders,
                start_from=_known_head(start_from, models[0]),
                device=device,
                workers=workers,
                work=work,
                resume=resume,
                overwrite=overwrite,
                data=", ".join(Path(image).name or str(image) for image in images or ["a list"]),
                recipe=_recipe(),
                progress=progress,
                say=lambda message: note(message, quiet=quiet),
            )
    except KeyboardInterrupt:
        folder = work or work_folder(output)
        if leads() and (folder / NAME).exists():
            note(f"stopped; the same command with --resume goes on from {folder / NAME}")
        raise
    if report.leads:
        _summarise(report, json)


def _options(given: dict[str, Any], config: str | None, masks: bool) -> TrainConfig:
    """The options of the command line, and below them those of ``--config``."""
    from fmupsample.training.config import TrainConfig

    options = TrainConfig.parse(config) if config else {}
    if masks:
        options.setdefault("objective", {"masks": 1.0})
    options |= {name: value for name, value in given.items() if value is not None}
    return TrainConfig.from_dict(options)


def _models(which: list[dict[str, Any]], options: TrainConfig, views: int) -> list[Backbone]:
    from fmupsample.backbones import load_backbone

    largest = max(options.image_sizes) if options.image_sizes else None
    square = None if largest is None else (largest, largest)
    return [load_backbone(image_size=square, views=views, **each) for each in which]


def _prepare(backend: str, device: str, quiet: bool) -> None:
    """Build operators now, where a minute of compiling can be shown, not under the bar."""
    from fmupsample.device import resolve_device
    from fmupsample.ops.backend import check_backend, prepare, set_backend
    from fmupsample_cli.progress import BuildLine

    set_backend(backend)
    check_backend(resolve_device(device))
    with BuildLine(quiet=quiet) as line:
        prepare(resolve_device(device), line)


def _known_head(start_from: Path | None, backbone: Backbone) -> Path | None:
    """The file that ``--from`` means, which may be a name."""
    from fmupsample.errors import HeadError
    from fmupsample.upsamplers.loading import find_head

    name = current_name(str(start_from))
    if start_from is None or name not in any_backbone_names() or start_from.exists():
        return start_from
    found = find_head(backbone, name)
    if found is None:
        raise HeadError(f"there is no {name} head to start from")
    return found


def _recipe() -> str:
    """The command as it was typed, absolute paths cut to their last part."""
    words = [Path(w).name if Path(w).is_absolute() else w for w in sys.argv[1:]]
    return shlex.join(["fmupsample", *words])


def _summarise(report: TrainReport, as_json: bool) -> None:
    from fmupsample_cli.progress import warn
    from fmupsample_cli.report import print_summary

    score = report.score
    rows: dict[str, Any] = {
        "head": f"{report.output}, {report.parameters:,} parameters",
        "pictures": f"{report.pictures} trained on, {report.held_out} held out",
        "best step": f"{report.best_step} of {report.config.steps}",
    }
    if score is not None:
        terms = ", ".join(f"{name} {value:.3f}" for name, value in score.relative.items())
        rows["held-out loss"] = f"{score.ratio:.3f} of bilinear interpolation's ({terms})"
        if not score.better:
            warn(
                "on the held-out pictures this head is no better than bilinear interpolation: "
                "give it more --steps or more pictures, or use --upsampler jbu"
            )
    else:
        warn("nothing was held out: whether the head is better than bilinear is not known")
    each = report.seconds / report.config.steps
    rows["time"] = f"{report.seconds:.0f} s, {each:.2f} s a step"
    rows["log, curve, previews"] = str(report.work)
    print_summary("train", rows, as_json=as_json, payload=report.to_json())
