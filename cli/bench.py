"""``fmupsample bench``: speed, memory, cost and quality of upsamplers on the user's own machine."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fmupsample_cli import options as o

if TYPE_CHECKING:
    from fmupsample.bench.run import BenchReport
    from fmupsample.labels import Dataset, Survey

MEASURING = "Measuring"

Pictures = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[IMAGES...]",
        help="Pictures to measure on, the first four. Default: photographs of the examples, or a "
        "drawn picture. With --labels: the folder that these belong to.",
        show_default=False,
    ),
]
Upsamplers = Annotated[
    str | None,
    typer.Option(
        "--upsamplers",
        metavar="NAME,...",
        help="Which ones; see `fmupsample models --upsamplers`. Default: all for a frozen model.",
        show_default=False,
        rich_help_panel=o.MODEL,
    ),
]
Heads = Annotated[
    list[Path] | None,
    typer.Option(
        "--head",
        metavar="FILE",
        help="A trained head (.safetensors), as a row of its own; may be repeated. Methods without "
        "one have the parameters of the shipped head, or random ones.",
        show_default=False,
        rich_help_panel=o.MODEL,
    ),
]
Sizes = Annotated[
    str,
    typer.Option(
        "--sizes",
        metavar="N,...",
        help="Sides of the square that pictures are shown as.",
        rich_help_panel=MEASURING,
    ),
]
Rounds = Annotated[
    int,
    typer.Option(
        "--rounds",
        min=1,
        metavar="N",
        help="How often each is timed. Fewer, but three at least, once --seconds are over.",
        rich_help_panel=MEASURING,
    ),
]
Seconds = Annotated[
    float,
    typer.Option(
        "--seconds",
        min=0.1,
        metavar="N",
        help="Begin no further round of a size after this.",
        rich_help_panel=MEASURING,
    ),
]
NoMemory = Annotated[
    bool,
    typer.Option("--no-memory", help="Without peak memory.", rich_help_panel=MEASURING),
]
Labels = Annotated[
    Path | None,
    typer.Option(
        "--labels",
        metavar="FOLDER",
        help="Labels of the pictures in IMAGES: also compare linear probes, at the largest size.",
        show_default=False,
        rich_help_panel=o.PICTURES,
    ),
]
MostPictures = Annotated[
    int,
    typer.Option(
        "--most-pictures",
        min=3,
        metavar="N",
        help="Of labelled ones, evenly spread; every third is to judge by.",
        rich_help_panel=o.PICTURES,
    ),
]
ReportFolder = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FOLDER",
        help="Also write bench.json, bench.md and (with matplotlib) bench.png there.",
        show_default=False,
        rich_help_panel=o.RESULTS,
    ),
]


def bench(
    images: Pictures = None,
    upsamplers: Upsamplers = None,
    head: Heads = None,
    backbone: o.BackboneName = "embedded",
    layer: o.Layer = None,
    backbone_weights: o.BackboneWeights = None,
    sizes: Sizes = "224,448",
    rounds: Rounds = 7,
    seconds: Seconds = 90,
    no_memory: NoMemory = False,
    labels: Labels = None,
    most_pictures: MostPictures = 90,
    device: o.Device = "auto",
    backend: o.Backend = o.BackendName.auto,
    output: ReportFolder = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Measure upsamplers here: time, peak memory, parameters, multiply-adds, probe quality.

        fmupsample bench

        fmupsample bench photos/ --upsamplers bilinear,jbu,resfu --backbone dinov2-s -o bench/

        fmupsample bench images/ --labels labels/ --head sapa.safetensors -o bench/

    Methods take turns, in a new order every round, so that ratios hold on a machine with other
    work. What cannot be measured has a row that says why. Ctrl-C keeps what was measured.
    """
    wanted = _sizes(sizes)
    labelled = _labelled(images, labels, most_pictures, quiet)
    from functools import partial

    from fmupsample.backbones import load_backbone
    from fmupsample.bench.methods import choose
    from fmupsample.bench.pictures import default_pictures
    from fmupsample.bench.quality import measure
    from fmupsample.bench.run import Bench, BenchOptions
    from fmupsample.device import resolve_device
    from fmupsample.images import find_images
    from fmupsample.ops.backend import check_backend, prepare, set_backend
    from fmupsample_cli.pictures import refuse_several
    from fmupsample_cli.progress import BuildLine, RichProgress, note
    from fmupsample_cli.report import save_files

    refuse_several("bench")
    options = BenchOptions(wanted, rounds, seconds, not no_memory)
    place = resolve_device(device)
    set_backend(backend.value)
    check_backend(place)
    if output is not None:
        save_files(output, {})  # said now, and not after minutes
    sources = find_images(images) if images else default_pictures()
    load = partial(load_backbone, backbone, layer=layer, weights=backbone_weights)
    model = load()
    methods = choose(model, _names(upsamplers), head or ())
    with BuildLine(quiet=quiet) as line:
        used = prepare(place, line)
    if used.reason is not None:
        note(f"plain PyTorch is used on {place}: {used.reason}", quiet=quiet)
    note(
        f"{len(methods)} upsamplers for {model.name} ({model.channels} channels, stride "
        f"{model.stride[0]}x{model.stride[1]}) on {place}",
        quiet=quiet,
    )
    with RichProgress(quiet=quiet, unit="calls") as progress:
        run = Bench(load, model, methods, sources, place, options, progress)

        def save() -> None:
            _write(output, run.report)

        try:
            run.run(save)
            if labelled is not None:
                measure(run, labelled[0].pairs, labelled[1].table, save)
            run.report.complete = True
        except KeyboardInterrupt:
            _finish(run.report, output, as_json=json)
            raise
    _finish(run.report, output, as_json=json)
    if not run.report.rows:
        raise typer.Exit(1)


def _sizes(text: str) -> tuple[int, ...]:
    from fmupsample.errors import UsageError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"--sizes {text!r} is not understood: give pixels such as 224,448"
        ) from None


def _names(text: str | None) -> list[str] | None:
    """``"a, b"`` -> the names; ``None`` means all."""
    return None if text is None else [n.strip().lower() for n in text.split(",") if n.strip()]


def _labelled(
    images: list[str] | None, labels: Path | None, most: int, quiet: bool
) -> tuple[Dataset, Survey] | None:
    """The labelled pictures that count and what their labels hold, before a model is loaded."""
    if labels is None:
        return None
    from fmupsample.bench.quality import split, spread
    from fmupsample.errors import UsageError
    from fmupsample.labels import open_dataset, survey
    from fmupsample_cli.probe_options import show_survey

    if not images or len(images) != 1:
        raise UsageError("--labels needs one folder of pictures: bench IMAGES --labels FOLDER")
    dataset = open_dataset(images[0], labels)
    dataset.pairs = spread(dataset.pairs, most)
    split(dataset.pairs)
    found = survey(dataset)
    show_survey(dataset, found, what="probes", quiet=quiet)
    return dataset, found


def _write(output: Path | None, report: BenchReport) -> list[str]:
    """bench.json, bench.md and, with matplotlib, bench.png: each whole or not at all."""
    if output is None:
        return []
    from fmupsample.bench.chart import draw
    from fmupsample.bench.tables import markdown
    from fmupsample.errors import UsageError
    from fmupsample_cli.report import json_text, save_files

    text = json_text(report.to_json()) + "\n"
    files = {"bench.json": text.encode(), "bench.md": markdown(report).encode()}
    with suppress(UsageError):  # said at the end
        picture = draw(report)
        if picture is not None:
            files["bench.png"] = picture
    save_files(output, files)
    return list(files)


def _finish(report: BenchReport, output: Path | None, *, as_json: bool) -> None:
    from fmupsample.bench.tables import tables, where
    from fmupsample_cli.progress import warn
    from fmupsample_cli.report import print_json, print_table

    written = _write(output, report)
    if written and report.rows and "bench.png" not in written:
        warn("bench.png was not drawn: charts need matplotlib, pip install 'fmupsample[plot]'")
    if as_json:
        print_json(report.to_json())
        return
    for size, why in report.skipped.items():
        warn(f"{size} px: {why}")
    for table in tables(report):
        columns = [column.replace(": ", "\n") for column in table.columns]
        print_table(columns, table.rows, title=table.title, right=columns[1:-1])
    print(f"  {where(report)}")
    if written:
        print(f"  written to {output}: {', '.join(written)}")
