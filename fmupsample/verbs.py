"""The commands as functions: on paths, with the options of the command line as arguments."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from fmupsample.backbones import Backbone, load_backbone
from fmupsample.distributed import is_distributed
from fmupsample.draw.renderer import Point
from fmupsample.errors import UsageError
from fmupsample.images import find_images, is_video
from fmupsample.jobs.extract import ExtractOptions, ExtractReport
from fmupsample.jobs.extract import extract as run_extract
from fmupsample.jobs.visualize import Report, VisualizeOptions
from fmupsample.jobs.visualize import visualize as run_visualize
from fmupsample.pipeline import Pipeline, open_pipeline
from fmupsample.progress import SILENT, Progress
from fmupsample.training.config import TrainConfig, parse_objective
from fmupsample.training.report import TrainReport
from fmupsample.training.run import train as run_train
from fmupsample.upsamplers.loading import find_head
from fmupsample.video import wanted_clips, with_frames

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Options = TypeVar("Options")


def extract(
    images: Paths,
    output: str | Path,
    *,
    every: int | None = None,
    start: str | None = None,
    stop: str | None = None,
    overwrite: bool = False,
    prune: bool = False,
    progress: Progress = SILENT,
    **options: Any,
) -> ExtractReport:
    """Write the features of pictures and frames into files, as ``fmupsample extract`` does.

        fmupsample.extract("photos/", "features/", backbone="dinov2-s", format="compact")

    Args:
        images: pictures and videos, folders, patterns; one or several.
        output: a folder. What an earlier run of the same options finished is not done again.
        every, start, stop: which frames of videos, as ``--every``, ``--from`` and ``--to``.
        overwrite, prune: as of :func:`fmupsample.runs.run.run`.
        options: fields of :class:`.ExtractOptions` (format, dtype, output_size, ...), and arguments
            of :func:`.open_pipeline` (backbone, upsampler, layer, image_size, device, ...).

    Returns:
        What was done, and what failed: pictures that cannot be used do not end the run.

    Raises:
        UsageError, OutputError, BackboneError, HeadError: nothing was started, or no more is done;
            finished results stay.
    """
    wanted, models = split_options(ExtractOptions, options, "extract")
    refuse_several_processes()
    sources = find_images(listed(images), exclude=[Path(output)], warn=progress.warn, videos=True)
    clips = wanted_clips(sources, every, start, stop, progress=progress)
    pipeline = open_pipeline(**models)
    frames = with_frames(sources, clips) if clips else sources
    more = {"overwrite": overwrite, "prune": prune, "progress": progress}
    return run_extract(pipeline, frames, Path(output), wanted, **more)


def visualize(
    images: Paths,
    output: str | Path,
    *,
    points: Sequence[str | tuple[float, float]] = (),
    every: int | None = None,
    start: str | None = None,
    stop: str | None = None,
    progress: Progress = SILENT,
    **options: Any,
) -> Report:
    """Draw the features of pictures and videos as colours, as ``fmupsample visualize`` does.

        fmupsample.visualize("photos/", "pictures/", points=[(320, 240)])

    Args:
        points: ``(x, y)`` in pixels of the original pictures, for drawings of similarity.
        options: fields of :class:`.VisualizeOptions` (layout, basis, image_format, ...), and
            arguments of :func:`.open_pipeline`.

    The others, what it returns and raises: as of :func:`extract`.
    """
    shown = [p if isinstance(p, str) else ",".join(map(str, p)) for p in points]
    parsed = tuple(dict.fromkeys(map(Point.parse, shown)))
    wanted, models = split_options(VisualizeOptions, {"points": parsed, **options}, "visualize")
    refuse_several_processes()
    sources = find_images(listed(images), exclude=[Path(output)], warn=progress.warn, videos=True)
    clips = wanted_clips(sources, every, start, stop, progress=progress)
    wanted.check(videos=bool(clips))
    pictures = [source for source in sources if not is_video(source)]
    pipeline = open_pipeline(**models)
    return run_visualize(pipeline, pictures, output, wanted, clips=clips, progress=progress)


def train(
    images: Paths,
    output: str | Path,
    *,
    backbone: str | Backbone | Sequence[Backbone] = "embedded",
    layer: int | str | None = None,
    backbone_weights: str | Path | None = None,
    views: int = 1,
    start_from: str | Path | None = None,
    validation: Paths = (),
    masks: Paths | Mapping[str, float] = (),
    **options: Any,
) -> TrainReport:
    """Train an upsampler's head on pictures, without labels, as ``fmupsample train`` does.

        fmupsample.train("photos/", "head.safetensors", backbone="dinov2-s", steps=2000)

    Args:
        output: the head, ``*.safetensors``.
        backbone: a name, a backbone, or several backbones that take turns (a head for any).
        layer, backbone_weights, views: of a backbone by name.
        start_from: a head file, or the name of an upsampler whose shipped head to go on from.
        validation: pictures that choose the best step; default: some are held out.
        masks: folders of masks, for the ``masks`` objective, or what each of them counts.
        options: fields of :class:`.TrainConfig` (upsampler, steps, image_sizes, objective, ...),
            and arguments of :func:`fmupsample.training.run.train` (device, resume, work, ...).

    Raises:
        UsageError, HeadError, TrainingError: as of :func:`fmupsample.training.run.train`.
    """
    own = inspect.signature(run_train).parameters.keys() - {"backbone", "sources", "config"}
    asked = {name: options.pop(name) for name in own & options.keys()}
    if isinstance(options.get("objective"), str):
        options["objective"] = parse_objective(options["objective"])
    weights = dict(masks) if isinstance(masks, Mapping) else dict.fromkeys(listed(masks), 1.0)
    if weights:
        options.setdefault("objective", {"masks": 1.0})
    config = TrainConfig.from_dict(options)
    work = asked.get("work") or Path(output).with_name(f"{Path(output).name}.train")
    sources = find_images(listed(images), exclude=[Path(work)])
    held_out = find_images(listed(validation)) if validation else []
    if isinstance(backbone, str):
        largest = max(config.image_sizes) if config.image_sizes else None
        square = None if largest is None else (largest, largest)
        chosen = {"layer": layer, "weights": backbone_weights, "views": views}
        backbone = load_backbone(backbone, image_size=square, **chosen)
    models = [backbone] if isinstance(backbone, Backbone) else list(backbone)
    return run_train(
        models,
        sources,
        output,
        config,
        validation=held_out,
        masks=[(Path(folder), weight) for folder, weight in weights.items()],
        start_from=_head(start_from, models[0]),
        **{"data": ", ".join(Path(i).name for i in listed(images)), **asked},
    )


def _head(named: str | Path | None, backbone: Backbone) -> Path | None:
    if named is None or Path(named).exists():
        return None if named is None else Path(named)
    return find_head(backbone, str(named)) or Path(named)


def listed(paths: Paths) -> list[str | os.PathLike[str]]:
    """Return the paths that were given, or the only one, as a list."""
    return [paths] if isinstance(paths, str | os.PathLike) else list(paths)


def refuse_several_processes() -> None:
    """Raise a UsageError in a process of ``torchrun``, which shares the work of commands only."""
    if is_distributed():
        raise UsageError("this function is for one process: torchrun is for `-m fmupsample`")


def split_options(
    kind: Callable[..., Options], given: Mapping[str, Any], verb: str
) -> tuple[Options, dict[str, Any]]:
    """Divide keyword arguments into a dataclass of a run's options and those of a pipeline.

    Raises:
        UsageError: an argument that neither knows.
    """
    own = {field.name for field in fields(kind)}
    others = inspect.signature(open_pipeline).parameters.keys() - {"options"}
    others |= inspect.signature(Pipeline).parameters.keys()
    for name in given:
        if name not in own | others:
            near = difflib.get_close_matches(name, own | others, 1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(own))}"
            raise UsageError(f"{verb} has no option {name!r}: {hint}")
    return (
        kind(**{name: value for name, value in given.items() if name in own}),
        {name: value for name, value in given.items() if name not in own},
    )
