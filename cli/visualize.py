"""``fmupsample visualize``: pictures of what the features know."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fmupsample_cli import groups as g
from fmupsample_cli import options as o
from fmupsample_cli import videos as v


class LayoutName(StrEnum):
    """What is drawn for each picture."""

    panel = "panel"
    single = "single"
    overlay = "overlay"


class PictureFormat(StrEnum):
    """File format of the results."""

    png = "png"
    jpg = "jpg"


def visualize(
    images: v.Inputs = None,
    output: o.Output = ...,
    list_file: o.ListFile = None,
    models: g.PipelineOptions = ...,
    fit_head: o.FitHead = False,
    span: g.Span = ...,
    layout: Annotated[
        LayoutName,
        typer.Option(
            "--layout",
            help="panel: photograph, features, bilinear and upsampled side by side; single: the "
            "upsampled colours alone; overlay: them over the photograph.",
            rich_help_panel=o.RESULTS,
        ),
    ] = LayoutName.panel,
    basis: Annotated[
        str,
        typer.Option(
            "--basis",
            metavar="shared|image|FILE",
            help="PCA basis: one for all pictures of the run (saved as basis.safetensors), one for "
            "each picture, or the file of an earlier run, for the same colours again.",
            rich_help_panel=o.PICTURES,
        ),
    ] = "shared",
    foreground: Annotated[
        bool,
        typer.Option(
            "--foreground",
            help="Find each picture's foreground, colour it alone and darken the rest.",
            rich_help_panel=o.PICTURES,
        ),
    ] = False,
    point: Annotated[
        list[str] | None,
        typer.Option(
            "--point",
            metavar="X,Y",
            help="Also draw how similar every feature is to the one at this pixel of the original "
            "picture. May be repeated.",
            show_default=False,
            rich_help_panel=o.PICTURES,
        ),
    ] = None,
    output_size: Annotated[
        str,
        typer.Option(
            "--output-size",
            metavar="image|original|HxW|xN",
            help="Size of single and overlay pictures: what the model saw, the original pixels, "
            "exactly HxW, or N times the feature grid.",
            rich_help_panel=o.RESULTS,
        ),
    ] = "image",
    image_format: Annotated[
        PictureFormat,
        typer.Option("--format", help="File format of the results.", rich_help_panel=o.RESULTS),
    ] = PictureFormat.png,
    contact_sheet: Annotated[
        bool,
        typer.Option(
            "--sheet/--no-sheet",
            help="Also a contact sheet of all pictures of the run, if there are several.",
            rich_help_panel=o.RESULTS,
        ),
    ] = True,
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Draw the features of pictures and videos as colours (PCA), before and after upsampling.

    Equal colours mean equal features, in all pictures of a run. Results keep the names and folders
    of the pictures; what is finished is not done again by the next run. Exit code 3 means that some
    pictures failed; the others are there.

        fmupsample visualize photos/ -o pictures/

        fmupsample visualize cat.jpg -o pictures/ --point 320,240

        fmupsample visualize clip.mp4 -o pictures/ --every 2 --from 0:10 --to 0:20

    A video becomes a video (mp4, without sound), in colours that are the same for all its frames.

    With `torchrun --nproc-per-node N -m fmupsample visualize ...` N GPUs share the pictures
    and videos.
    """
    from fmupsample.distributed import leads
    from fmupsample.runs.workers import joined
    from fmupsample_cli.pictures import find_pictures, refuse_to_fit
    from fmupsample_cli.progress import RichProgress

    with joined() as team:
        if team is not None:
            refuse_to_fit(fit_head)
        # What cannot work is said before torch and the models are loaded, and by one process only.
        if leads():
            sources, complete = find_pictures(images, list_file, output, videos=True)
            clips = v.look_into(sources, span.every, span.start, span.stop, quiet=quiet)
            complete = complete and not any(clip.broken for clip in clips)
        else:
            team.wait_for_plan()
            sources, clips, complete, quiet = [], [], True, True
        models.check()

        from fmupsample.draw.renderer import Point
        from fmupsample.jobs.visualize import VisualizeOptions
        from fmupsample.jobs.visualize import visualize as draw
        from fmupsample_cli.loading import backend_text, open_pipeline, used_backend
        from fmupsample_cli.report import print_summary

        options = VisualizeOptions(
            layout=layout.value,
            basis=basis,
            foreground=foreground,
            points=tuple(dict.fromkeys(Point.parse(text) for text in point or ())),
            image_format=image_format.value,
            output_size=output_size,
            contact_sheet=contact_sheet,
            overwrite=overwrite,
        )
        options.check(videos=bool(clips))
        fit_on = v.training_pictures(sources) if fit_head else None
        pipeline = open_pipeline(models, quiet=quiet, fit_on=fit_on)
        pictures = v.pictures_in(sources)
        unit = "frames" if clips and not pictures else "pictures"
        with RichProgress(quiet=quiet, unit=unit) as progress:
            report = draw(
                pipeline, pictures, output, options, clips=clips, progress=progress, workers=team
            )
    if not leads():
        return

    choice = used_backend(pipeline)
    payload = {
        "command": "visualize",
        "backbone": pipeline.backbone.name,
        "layer": pipeline.backbone.layer,
        "views": models.views,
        "upsampler": pipeline.upsampler.name,
        "backend": choice.name,
        "backend_reason": choice.reason,
        **report.to_json(),
    }
    rows = {**_rows(report), "backend": backend_text(choice)}
    print_summary(_title(report), rows, as_json=as_json, payload=payload)
    if report.failed or not complete:
        raise typer.Exit(3 if report.drawn or report.skipped else 1)


def _title(report) -> str:
    of = report.pictures + len(report.clips)
    count = of - len({failure["source"] for failure in report.failed})
    nouns = ["pictures"] * bool(report.pictures) + ["videos"] * bool(report.clips)
    noun = nouns[0].removesuffix("s") if of == 1 else " and ".join(nouns)
    return f"{count} of {of} {noun} complete, in {Path(report.output)}"


def _rows(report) -> dict[str, str | int | float]:
    rows: dict[str, str | int | float] = {"drawn": _files(report.drawn)}
    if report.skipped:
        rows["there already"] = f"{report.skipped} (--overwrite draws them again)"
    if report.failed:
        rows["failed"] = len(report.failed)
    if report.clips:
        rows["videos"] = v.videos_text(report.clips)
    if report.sheets:
        rows["contact sheet"] = _files(report.sheets)
    if report.basis:
        share = f" ({report.explained:.0%} of the variance)" if report.explained else ""
        rows["PCA basis"] = f"{report.basis}{share}"
    rows["seconds"] = round(report.seconds, 1)
    return rows


def _files(paths: list[Path]) -> str:
    if len(paths) <= 3:
        return ", ".join(str(path) for path in paths) or "nothing new"
    return f"{len(paths)} files, the first {paths[0]}"
