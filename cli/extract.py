"""``fmupsample extract``: dense features of pictures, as files for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fmupsample_cli import groups as g
from fmupsample_cli import options as o
from fmupsample_cli import videos as v

if TYPE_CHECKING:
    from fmupsample.jobs.extract import ExtractReport
    from fmupsample.ops.backend import Choice
    from fmupsample.video import Clip


class Format(StrEnum):
    """File formats of the results."""

    safetensors = "safetensors"
    npy = "npy"
    pt = "pt"
    compact = "compact"


class Dtype(StrEnum):
    """Number formats of the results."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


FormatOption = Annotated[
    Format,
    typer.Option(
        "--format",
        help="safetensors (key `features`, metadata in the header), npy (bare array), pt, or "
        "compact: some 30 times smaller; `fmupsample.open` makes any part of the map from it.",
        rich_help_panel=o.RESULTS,
    ),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        "--dtype",
        parser=o.number_format_of(Dtype),
        metavar="fp32|fp16|bf16",
        help="Numbers in the files; npy has no bf16.",
        rich_help_panel=o.RESULTS,
    ),
]
WeightBits = Annotated[
    int,
    typer.Option(
        "--weight-bits",
        metavar="8|16|32",
        help="Bits of each kernel weight in compact files; 8 nearly halves them.",
        rich_help_panel=o.RESULTS,
    ),
]
OutputSize = Annotated[
    str,
    typer.Option(
        "--output-size",
        metavar="image|original|HxW|xN",
        help="Size of the maps: what the model saw of the picture, the file's own pixels, "
        "exactly HxW, or N times the model's grid. Beyond 2 million pixels, enlarged bilinearly.",
        rich_help_panel=o.RESULTS,
    ),
]
TokensOnly = Annotated[
    bool,
    typer.Option(
        "--tokens-only",
        help="Write the low-resolution features, without upsampling.",
        rich_help_panel=o.RESULTS,
    ),
]
Pca = Annotated[
    int | None,
    typer.Option(
        "--pca",
        min=1,
        metavar="N",
        help="Keep N principal components, one basis for all pictures (saved as pca.safetensors).",
        show_default=False,
        rich_help_panel=o.RESULTS,
    ),
]
Global = Annotated[
    bool,
    typer.Option(
        "--global",
        help="Also keep a vector of the whole picture (the class token, or what the model pools) "
        "in the file, as `global`.",
        rich_help_panel=o.RESULTS,
    ),
]
ShardSize = Annotated[
    int | None,
    typer.Option(
        "--shard-size",
        min=1,
        metavar="N",
        help="Write tar files of N pictures each, as WebDataset reads them, in place of a file a "
        "picture.",
        show_default=False,
        rich_help_panel=o.RESULTS,
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="auto|local|HOST:PORT",
        help="Compute on a Ray cluster (`pip install 'fmupsample[ray]'`): the one this machine is "
        "part of, one started here for this run, or the one at an address.",
        show_default=False,
        rich_help_panel=o.COMPUTE,
    ),
]


def extract(
    images: v.Inputs = None,
    output: o.Output = ...,
    list_file: o.ListFile = None,
    options: g.PipelineOptions = ...,
    fit_head: o.FitHead = False,
    span: g.Span = ...,
    format: FormatOption = Format.safetensors,
    dtype: DtypeOption = Dtype.fp16,
    weight_bits: WeightBits = 16,
    output_size: OutputSize = "image",
    tokens_only: TokensOnly = False,
    pca: Pca = None,
    global_vector: Global = False,
    shard_size: ShardSize = None,
    ray: Ray = None,
    overwrite: o.Overwrite = False,
    prune: o.Prune = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Write the upsampled features of pictures, and of the frames of videos, one file each.

    Each file holds a map [channels, height, width]. The folder structure of the input is kept, and
    `manifest.jsonl` says for each picture where its result is, how it maps to the original pixels,
    and what made it. Run the same command again to continue after an interruption, or to add
    pictures: what is finished is skipped.

        fmupsample extract photos/ -o features/

        fmupsample extract 'photos/*.jpg' -o small/ --pca 32 --output-size x4

        fmupsample extract clip.mp4 -o features/ --every 5 --from 1:00 --to 1:30

    A 448 x 448 map of 384 channels takes 154 MB in fp16; --format compact, --pca, --output-size and
    --tokens-only make it smaller. Exit code 3 means that some pictures failed; the others are
    there. Several GPUs, or machines with a common disk, share the pictures:

        torchrun --nproc-per-node 4 -m fmupsample extract photos/ -o features/
    """
    from fmupsample.distributed import leads
    from fmupsample.runs.workers import joined
    from fmupsample_cli.pictures import find_pictures, refuse_ray, refuse_to_fit
    from fmupsample_cli.progress import RichProgress, note

    with joined() as team:
        if team is not None:
            refuse_to_fit(fit_head)
        if ray is not None:
            refuse_ray(team is not None)
        # What cannot work is said before torch and the models are loaded, and by one process only.
        if leads():
            sources, complete = find_pictures(images, list_file, output, videos=True)
            clips = v.look_into(sources, span.every, span.start, span.stop, quiet=quiet)
            complete = complete and not any(clip.broken for clip in clips)
        else:
            team.wait_for_plan()
            sources, clips, complete, quiet = [], [], True, True
        options.check()

        from fmupsample.formats.files import check_format
        from fmupsample.jobs.extract import ExtractOptions
        from fmupsample.jobs.extract import extract as run
        from fmupsample_cli.loading import open_pipeline, used_backend

        check_format(format, dtype)
        if tokens_only and options.upsampler is None and options.head is None:
            options.upsampler = "nearest"  # tokens need no upsampler, and so no head
        fit_on = v.training_pictures(sources) if fit_head else None
        pipeline = open_pipeline(options, quiet=quiet, fit_on=fit_on)
        if clips:
            from fmupsample.video import with_frames

            sources = with_frames(sources, clips)
        wanted = ExtractOptions(
            format.value,
            dtype.value,
            output_size,
            tokens_only,
            pca,
            weight_bits,
            shard_size,
            global_vector,
        )
        cluster = None
        if ray is not None:
            from fmupsample.runs.ray import RayCluster

            cluster = RayCluster(ray, options.device, options.batch_size, options.workers)
        unit = "frames" if clips and not v.pictures_in(sources) else "pictures"
        with RichProgress(quiet=quiet, unit=unit) as progress:
            report = run(
                pipeline,
                sources,
                output,
                wanted,
                overwrite=overwrite,
                prune=prune,
                progress=progress,
                say=lambda message: note(message, quiet=quiet),
                workers=team,
                cluster=cluster,
            )
    if not leads():
        return
    _summarise(report, clips, used_backend(pipeline), json)
    if report.failed or not complete:
        raise typer.Exit(3 if report.done or report.skipped else 1)


def _summarise(
    report: ExtractReport, clips: Sequence[Clip], backend: Choice, as_json: bool
) -> None:
    from fmupsample.images import printable
    from fmupsample.wording import human_bytes
    from fmupsample_cli.loading import backend_text
    from fmupsample_cli.report import print_summary

    records = [*report.done, *report.skipped]
    options = report.options
    size = sum(r.get("bytes", 0) for r in records)
    rate = len(report.done) / report.seconds if report.done else 0.0
    shapes = sorted({tuple(r["shape"]) for r in records})
    payload: dict[str, Any] = {
        "done": len(report.done),
        "skipped": len(report.skipped),
        "failed": len(report.failed),
        "failures": [
            {"source": r.get("video", r["source"]), "error": r["error"]} for r in report.failed
        ],
        "videos": [clip.to_json() for clip in clips],
        "manifest": printable(report.manifest),
        "shapes": shapes[:20],
        "bytes": size,
        "seconds": round(report.seconds, 3),
        "pictures_per_second": round(rate, 3),
        "explained_variance": report.explained,
        "backend": backend.name,
        "backend_reason": backend.reason,
        "options": options,
    }
    counts = f"{len(report.done)} done"
    if report.skipped:
        counts += f", {len(report.skipped)} finished before"
    if report.failed:
        counts += f", {len(report.failed)} failed"
    rows = {"pictures and frames" if clips else "pictures": counts}
    if clips:
        rows["videos"] = v.videos_text(clips)
    if shapes:
        text = [" x ".join(map(str, shape)) for shape in (shapes[0], shapes[-1])]
        rows["maps"] = text[0] if len(shapes) == 1 else f"{text[0]} to {text[1]}"
        rows["maps"] += f", {options['dtype']}, {human_bytes(size)} in all"
    if report.explained is not None:
        rows["pca"] = f"{options['pca']} components hold {report.explained:.1%} of the variance"
    rows["time"] = f"{report.seconds:.1f} s" + (f", {rate:.2f} pictures/s" if rate else "")
    rows["backbone"] = f"{options['backbone']} ({options['backbone_fingerprint']})"
    if "views" in options:
        rows["backbone"] += f", {options['views']} views"
    method, fingerprint = options["upsampler"], options["upsampler_fingerprint"]
    if method is None:
        rows["upsampler"] = "none, low-resolution features"
    else:
        rows["upsampler"] = method if method == fingerprint else f"{method} ({fingerprint})"
        rows["backend"] = backend_text(backend)
    rows["manifest"] = printable(report.manifest)
    print_summary("extract", rows, as_json=as_json, payload=payload)
