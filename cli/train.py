"""``fmupsample train``: a head for a frozen backbone, from pictures, without labels."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fmupsample.upsamplers.registry import (
    Needs,
    any_backbone_names,
    current_name,
    either,
    learned_names,
)
from fmupsample_cli import options as o

if TYPE_CHECKING:
    from fmupsample.backbones import Backbone
    from fmupsample.training.run import TrainReport

TRAINING = "Training"

HeadOutput = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="The head file (.safetensors); appears when training is complete.",
        show_default=False,
        rich_help_panel=o.RESULTS,
    ),
]
Upsampler = Annotated[
    str | None,
    typer.Option(
        "--upsampler",
        metavar="NAME",
        help=f"Which upsampler to train: {either(any_backbone_names())} (for any backbone), "
        f"{either(learned_names(Needs.OWN_HEAD))}. Default: bilateral-cells, for this backbone.",
        autocompletion=o.complete_upsampler,
        show_default=False,
        rich_help_panel=o.MODEL,
    ),
]
Also = Annotated[
    list[str] | None,
    typer.Option(
        "--also",
        metavar="NAME[,layer=N][,weights=FILE]",
        help=f"A further backbone, for --upsampler {either(any_backbone_names())}; they take "
        "turns. May be repeated.",
        show_default=False,
        rich_help_panel=o.MODEL,
    ),
]
StartFrom = Annotated[
    Path | None,
    typer.Option(
        "--from",
        metavar="HEAD",
        help="Start from this head instead of new parameters: a file of the same backbone, or "
        "affinity or bilateral-cells, the shipped heads for any.",
        show_default=False,
        rich_help_panel=o.MODEL,
    ),
]
Validation = Annotated[
    list[str] | None,
    typer.Option(
        "--val",
        metavar="IMAGES",
        help="Pictures or a folder to validate on; may be repeated. Default: a twentieth of the "
        "pictures is held out.",
        show_default=False,
        rich_help_panel=o.PICTURES,
    ),
]
Labels = Annotated[
    list[Path] | None,
    typer.Option(
        "--labels",
        metavar="FOLDER",
        help="Indexed PNGs of the pictures' names, for --objective task; 255 is ignored. May be "
        "repeated.",
        show_default=False,
        rich_help_panel=o.PICTURES,
    ),
]
Masks = Annotated[
    list[str] | None,
    typer.Option(
        "--masks",
        metavar="FOLDER[=WEIGHT]",
        help="Indexed PNGs of the pictures' names, of any classes, for --objective masks, which is "
        "then the default; pictures without one teach nothing by it. May be repeated.",
        show_default=False,
        rich_help_panel=o.PICTURES,
    ),
]
CropSize = Annotated[
    str | None,
    typer.Option(
        "--image-size",
        metavar="N[,N...]",
        help="Side of the crops the model sees, pixels; several take turns. Default: 224.",
        show_default=False,
        rich_help_panel=o.PICTURES,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        "--steps",
        min=1,
        metavar="N",
        help="How many. Default: 2000 on a GPU, 400 on the CPU.",
        show_default=False,
        rich_help_panel=TRAINING,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        min=1,
        metavar="N",
        help="Crops a step, in each process. Default: 8 on a GPU, 2 on the CPU.",
        show_default=False,
        rich_help_panel=TRAINING,
    ),
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        "--lr",
        metavar="X",
        help="Peak learning rate. Default: 0.001.",
        show_default=False,
        rich_help_panel=TRAINING,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        min=0,
        metavar="N",
        help="The same seed gives the same head. Default: 0.",
        show_default=False,
        rich_help_panel=TRAINING,
    ),
]
ObjectiveOption = Annotated[
    str | None,
    typer.Option(
        "--objective",
        metavar="TERM[=WEIGHT],...",
        help="What to train for, of clusters, crops, regions, area, preserve, shifts, augment, "
        "masks, task. Default: clusters; with --masks, masks.",
        show_default=False,
        rich_help_panel=TRAINING,
    ),
]
MoreOptions = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE|JSON",
        help="More options as JSON, such as the config.json of an earlier run; options on the "
        "command line go before it.",
        show_default=False,
        rich_help_panel=TRAINING,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with an interrupted run; it ends as if it had not been interrupted.",
        rich_help_panel=TRAINING,
    ),
]
Work = Annotated[
    Path | None,
    typer.Option(
        "--work",
        metavar="FOLDER",
        help="Folder for checkpoint, log, curve and previews. Default: FILE.train beside the head.",
        show_default=False,
        rich_help_panel=o.RESULTS,
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Train anew, whatever an earlier run left.",
        rich_help_panel=o.RESULTS,
    ),
]
Precision = Annotated[
    o.PrecisionName | None,
    typer.Option(
        "--precision",
        help="Arithmetic of the model. Default: bf16 on a GPU that has it, else fp32.",
        show_default=False,
        rich_help_panel=o.COMPUTE,
    ),
]


def train(
    images: o.Images = None,
    output: HeadOutput = ...,
    list_file: o.ListFile = None,
    backbone: o.BackboneName = "embedded",
    layer: o.Layer = None,
    backbone_weights: o.BackboneWeights = None,
    views: o.Views = 1,
    also: Also = None,
    upsampler: Upsampler = None,
    start_from: StartFrom = None,
    image_size: CropSize = None,
    val: Validation = None,
    labels: Labels = None,
    masks: Masks = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    seed: Seed = None,
    objective: ObjectiveOption = None,
    config: MoreOptions = None,
    resume: Resume = False,
    work: Work = None,
    overwrite: Overwrite = False,
    device: o.Device = "auto",
    backend: o.Backend = o.BackendName.auto,
    precision: Precision = None,
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
    from fmupsample.images import find_images
    from fmupsample_cli.progress import BuildLine, RichProgress, note, warn

    # What cannot work is said before torch and the models are loaded.
    find = {"exclude": [work or output.with_name(f"{output.name}.train")], "warn": warn}
    sources = find_images(images or [], list_file=list_file, **find)
    validation = find_images(val, **find) if val else []

    from fmupsample.backbones import load_backbone
    from fmupsample.device import resolve_device
    from fmupsample.distributed import leads
    from fmupsample.ops.backend import check_backend, prepare, set_backend
    from fmupsample.training.checkpoint import NAME
    from fmupsample.training.config import TrainConfig, parse_objective
    from fmupsample.training.run import train as run
    from fmupsample.training.run import work_folder

    given = {
        "upsampler": upsampler,
        "image_sizes": None if image_size is None else _sizes(image_size),
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "objective": None if objective is None else parse_objective(objective),
        "precision": None if precision is None else precision.value,
    }
    options = TrainConfig.parse(config) if config else {}
    mask_folders = [_parse_masks(text) for text in masks or ()]
    if mask_folders and objective is None:
        options.setdefault("objective", {"masks": 1.0})
    options |= {name: value for name, value in given.items() if value is not None}
    wanted = TrainConfig.from_dict(options)
    quiet = quiet or not leads()
    set_backend(backend.value)
    check_backend(resolve_device(device))
    largest = max(wanted.image_sizes) if wanted.image_sizes else None
    square = None if largest is None else (largest, largest)
    models = [
        load_backbone(image_size=square, views=views, **which)
        for which in (
            {"name": backbone, "layer": layer, "weights": backbone_weights},
            *map(_parse_backbone, also or ()),
        )
    ]
    # Now, where a minute of compiling can be shown, and not under the bar of the run.
    with BuildLine(quiet=quiet) as line:
        prepare(resolve_device(device), line)
    try:
        with RichProgress(quiet=quiet, unit="steps") as progress:
            report = run(
                models,
                sources,
                output,
                wanted,
                validation=validation,
                labels=labels or (),
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


def _sizes(text: str) -> list[int]:
    from fmupsample.errors import UsageError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(
            f"image size {text!r} is not understood: give a number of pixels, or several: 168,224"
        ) from None


def _parse_masks(text: str) -> tuple[Path, float]:
    """``"folder=0.5"`` -> the folder and what its masks count."""
    from fmupsample.errors import UsageError

    folder, equals, weight = text.rpartition("=")
    if not equals or Path(text).is_dir():
        return Path(text), 1.0
    try:
        value = float(weight)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UsageError(f"--masks {text!r} is not understood: give FOLDER, or FOLDER=0.5")
    return Path(folder), value


def _parse_backbone(text: str) -> dict[str, Any]:
    """``"name,layer=5,weights=file"`` -> what :func:`load_backbone` takes."""
    from fmupsample.errors import UsageError

    name, *rest = text.split(",")
    found: dict[str, Any] = {"name": name}
    for part in rest:
        key, equals, value = part.partition("=")
        if key not in ("layer", "weights") or not equals:
            raise UsageError(
                f"--also {text!r} is not understood: give NAME, or NAME,layer=N,weights=FILE"
            )
        found[key] = value
    return found


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
