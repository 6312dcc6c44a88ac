"""``fmupsample probe`` as functions: fit a linear probe, judge it, use it on pictures.

probe = fmupsample.probe.fit("images/", "labels/", "probe.safetensors", classes="sky,road,car")
fmupsample.probe.evaluate(probe, "val/images/", "val/labels/")["miou"]
fmupsample.probe.predict(probe, "photos/", "masks/", overlay=True)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fmupsample.errors import ProbeError, UsageError
from fmupsample.images import find_images
from fmupsample.jobs.extract import ExtractReport
from fmupsample.jobs.predict import PredictOptions, predict_folder
from fmupsample.labels import open_dataset, parse_classes, parse_ignore, survey
from fmupsample.labels.depth import SCALE, survey_depth
from fmupsample.pipeline import Pipeline, open_pipeline
from fmupsample.probing.evaluate import evaluate as judge_classes
from fmupsample.probing.evaluate import evaluate_depth as judge_depth
from fmupsample.probing.evaluate import report, table_for
from fmupsample.probing.fit import fit_classes, fit_depth, fit_points, options_for, save_config
from fmupsample.probing.probe import Probe, load_probe, save_probe
from fmupsample.progress import SILENT, Progress
from fmupsample.verbs import Paths, listed, refuse_several_processes

_PIXELS = {"segmentation": 4096, "depth": 1024}  # drawn of a picture and step


def fit(
    images: str | Path,
    labels: str | Path | None = None,
    output: str | Path | None = None,
    *,
    task: str = "segmentation",
    classes: str | Sequence[str] | None = None,
    ignore: Sequence[int | str] = (),
    points: str | Path | None = None,
    layout: str | None = None,
    split: str | None = None,
    validation: tuple[str | Path, str | Path] | None = None,
    max_depth: float | None = None,
    depth_scale: float = SCALE,
    rates: Sequence[float] | None = None,
    epochs: int | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
    **models: Any,
) -> Probe:
    """Fit a probe to labelled pictures, or to clicks.

    Args:
        images, labels, layout, split: as of :func:`fmupsample.labels.open_dataset`.
        output: where to write it (``*.safetensors``, and a ``.json`` beside it); replaces a file.
        task: ``"segmentation"`` or ``"depth"``.
        classes: names, ``"sky,road"``, or a file, see :func:`fmupsample.labels.parse_classes`.
        ignore: values of labels that do not count.
        points: a file of clicks in place of ``labels``, see :mod:`fmupsample.probing.points`.
        validation: folders of pictures and labels that choose the learning rate.
        max_depth, depth_scale: metres; units a metre in the files.
        rates: learning rates to choose from.
        models: arguments of :func:`.open_pipeline` (backbone, upsampler, layer, image_size, ...).

    Raises:
        UsageError, ImageError, OutputError: folders, labels or a place that cannot be used.
    """
    if task not in _PIXELS:
        raise UsageError(f"task {task!r} is unknown: use {' or '.join(_PIXELS)}")
    if output is not None and Path(output).suffix != ".safetensors":
        raise UsageError(f"{output}: a probe is a .safetensors file")
    card = {"data": Path(images).name, "command": "fmupsample.probe.fit"}
    shared: dict[str, Any] = {"progress": progress, "card": card}
    drawn = {"pixels": _PIXELS[task], "seed": seed}
    if points is not None:
        if labels is not None or classes is not None or validation is not None:
            raise UsageError("points name the classes themselves: leave labels and classes away")
        shared |= {"rates": rates, "epochs": epochs, **drawn}
        sources = find_images([images])
        fitted = fit_points(open_pipeline(**models), points, sources, **shared)
    else:
        layout = "folders" if layout is None and task == "depth" else layout
        dataset = open_dataset(images, labels, layout=layout, split=split)
        held = None if validation is None else open_dataset(*validation, layout=layout)
        options = options_for(len(dataset.pairs), rates=rates, epochs=epochs, **drawn)
        shared["validation"] = held
        if task == "depth":
            high = survey_depth(dataset.pairs, depth_scale).high if max_depth is None else max_depth
            shared["scale"] = depth_scale
            fitted = fit_depth(open_pipeline(**models), dataset, high, options, **shared)
        else:
            given = None if classes is None else parse_classes(_joined(classes))
            ignored = parse_ignore([str(value) for value in ignore])
            table = survey(dataset, given=given, ignored=ignored).table
            fitted = fit_classes(open_pipeline(**models), dataset, table, options, **shared)
    if output is not None:
        save_probe(output, fitted.probe)
        save_config(Path(output), fitted.probe)
    return fitted.probe


def evaluate(
    probe: Probe | str | Path,
    images: str | Path,
    labels: str | Path | None = None,
    *,
    layout: str | None = None,
    split: str | None = None,
    ignore: Sequence[int | str] = (),
    tolerance: float = 0.0075,
    progress: Progress = SILENT,
    **models: Any,
) -> dict[str, Any]:
    """Judge a probe on labelled pictures.

    Args:
        probe: or its file.
        tolerance: of boundary F: pixels, or below 1 a share of the diagonal.
        models: arguments of :func:`.open_pipeline`, where they differ from those of the fit.

    Returns:
        ``miou``, ``pixel_accuracy``, ``boundary_f``, ``iou`` by class, ``confusion``, ...; of
        depth ``delta1``, ``abs_rel``, ``rmse``, ...

    Raises:
        ProbeError: another backbone or upsampler than those of the fit.
        UsageError, ImageError: folders or labels that cannot be used.
    """
    probe, pipeline = _opened(probe, models)
    depth = probe.task == "depth"
    layout = "folders" if layout is None and depth else layout
    dataset = open_dataset(images, labels, layout=layout, split=split)
    if depth:
        return judge_depth(probe, pipeline, dataset, probe.depth["scale"], progress).summary()
    ignored = parse_ignore([str(value) for value in ignore])
    table = survey(dataset, table_for(probe, dataset), ignored=ignored).table
    judged = judge_classes(probe, pipeline, dataset, table, tolerance=tolerance, progress=progress)
    return report(judged, table)


def predict(
    probe: Probe | str | Path,
    images: Paths,
    output: str | Path,
    *,
    overlay: bool = False,
    npy: bool = False,
    overwrite: bool = False,
    prune: bool = False,
    progress: Progress = SILENT,
    **models: Any,
) -> ExtractReport:
    """Write a mask (or depth map) of each picture into the folder ``output``.

    Args:
        probe: or its file.
        overlay, npy: as of :class:`.PredictOptions`.
        models: arguments of :func:`.open_pipeline`, where they differ from those of the fit.

    Raises:
        ProbeError: another backbone or upsampler than those of the fit.
        UsageError, OutputError: as of :func:`fmupsample.extract`.
    """
    refuse_several_processes()
    sources = find_images(listed(images), exclude=[Path(output)], warn=progress.warn)
    probe, pipeline = _opened(probe, models)
    more = {"overwrite": overwrite, "prune": prune, "progress": progress}
    wanted = PredictOptions(overlay, npy)
    return predict_folder(probe, pipeline, sources, Path(output), wanted, **more)


def _joined(classes: str | Sequence[str]) -> str:
    return classes if isinstance(classes, str) else ",".join(classes)


def _opened(probe: Probe | str | Path, models: dict[str, Any]) -> tuple[Probe, Pipeline]:
    """The probe, and the pipeline whose features it was fitted on."""
    if not isinstance(probe, Probe):
        probe = load_probe(probe)
    named = isinstance(models.get("backbone", ""), str)
    if named and probe.needs_weights and "backbone_weights" not in models:
        raise ProbeError(
            f"this probe was fitted on {probe.backbone['name']}, whose weights came from a file: "
            "name it as backbone_weights"
        )
    usual = {key: probe.pictures[key] for key in ("image_size", "fit", "precision")}
    usual["upsampler"] = probe.upsampler["name"]
    if named:
        usual |= {"backbone": probe.loadable_backbone, "views": probe.views}
        usual["layer"] = str(probe.backbone["layer"])
    pipeline = open_pipeline(**(usual | models))
    probe.check(pipeline)
    return probe, pipeline
