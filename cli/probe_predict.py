"""``fmupsample probe predict``: masks or depths of pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fmupsample_cli import options as o
from fmupsample_cli import probe_options as p

if TYPE_CHECKING:
    from fmupsample.probing.probe import Probe
    from fmupsample.runs.engine import Report

Overlay = Annotated[
    bool,
    typer.Option(
        "--overlay",
        help="Also pictures to look at: the classes over the photograph in overlays/; for depth "
        "its colours in colours/.",
        rich_help_panel=o.RESULTS,
    ),
]
Npy = Annotated[
    bool,
    typer.Option(
        "--npy",
        help="Also numbers: probabilities/ (float16 [classes, H, W] at the size the model saw); "
        "for depth metres/ (float32 [H, W]).",
        rich_help_panel=o.RESULTS,
    ),
]


def predict(
    probe: p.ProbeFile,
    images: o.Images = None,
    output: o.Output = ...,
    list_file: o.ListFile = None,
    overlay: Overlay = False,
    npy: Npy = False,
    backbone: p.OtherBackbone = None,
    backbone_weights: o.BackboneWeights = None,
    views: p.OtherViews = None,
    head: o.Head = None,
    image_size: p.ImageSizeOption = None,
    device: o.Device = "auto",
    backend: o.Backend = o.BackendName.auto,
    precision: p.PrecisionOption = None,
    batch_size: o.BatchSize = None,
    workers: o.Workers = None,
    overwrite: o.Overwrite = False,
    prune: o.Prune = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Write a mask of each picture, at its original pixels: an indexed PNG whose values are the
    classes and whose palette shows them. For depth a 16-bit PNG.

    The folder structure is kept. `manifest.jsonl` and `areas.csv` say how much of each picture each
    class takes; `legend.png` and `classes.json` which value is what. Run the same command again to
    continue, or to add pictures. Exit code 3 means that some pictures failed.

        fmupsample probe predict probe.safetensors photos/ -o masks/ --overlay

    With `torchrun --nproc-per-node N -m fmupsample probe predict ...` N GPUs share the pictures.
    """
    from fmupsample.distributed import leads
    from fmupsample.runs.workers import joined
    from fmupsample_cli.pictures import find_pictures
    from fmupsample_cli.progress import RichProgress, note

    with joined() as team:
        if leads():
            sources, complete = find_pictures(images, list_file, output)
        else:
            team.wait_for_plan()
            sources, complete, quiet = [], True, True
        from fmupsample.probing.probe import load_probe

        fitted = load_probe(probe)
        pipeline = p.open_for_probe(
            fitted,
            backbone=backbone,
            weights=backbone_weights,
            views=views,
            head=head,
            device=device,
            image_size=image_size,
            precision=precision,
            backend=backend.value,
            batch_size=batch_size,
            workers=workers,
            quiet=quiet,
        )
        from fmupsample.jobs.predict import PredictOptions, predict_folder

        with RichProgress(quiet=quiet) as progress:
            report = predict_folder(
                fitted,
                pipeline,
                sources,
                output,
                PredictOptions(overlay, npy),
                overwrite=overwrite,
                prune=prune,
                progress=progress,
                say=lambda message: note(message, quiet=quiet),
                workers=team,
            )
    if not leads():
        return
    _summarise(fitted, report, json)
    if report.failed or not complete:
        raise typer.Exit(3 if report.done or report.skipped else 1)


def _summarise(probe: Probe, report: Report, as_json: bool) -> None:
    from fmupsample.images import printable
    from fmupsample_cli.report import print_summary

    records = [*report.done, *report.skipped]
    rate = len(report.done) / report.seconds if report.done else 0.0
    folder = report.manifest.parent
    payload: dict[str, Any] = {
        "task": probe.task,
        "done": len(report.done),
        "skipped": len(report.skipped),
        "failed": len(report.failed),
        "failures": [{"source": r["source"], "error": r["error"]} for r in report.failed],
        "manifest": printable(report.manifest),
        "seconds": round(report.seconds, 3),
        "pictures_per_second": round(rate, 3),
        "options": report.options,
    }
    counts = f"{len(report.done)} done"
    if report.skipped:
        counts += f", {len(report.skipped)} finished before"
    if report.failed:
        counts += f", {len(report.failed)} failed"
    rows: dict[str, Any] = {"pictures": counts, "masks": printable(folder)}
    if probe.classes is not None and records:
        pixels = [r["shape"][0] * r["shape"][1] for r in records]
        shares = {
            name: sum(r["areas"][name] * n for r, n in zip(records, pixels, strict=True))
            / sum(pixels)
            for name in probe.classes.names
        }
        payload["areas"] = {name: round(share, 6) for name, share in shares.items()}
        largest = sorted(shares.items(), key=lambda item: -item[1])[:6]
        rows["of all pixels"] = ", ".join(f"{name} {share:.1%}" for name, share in largest)
        rows["legend"] = printable(folder / "legend.png")
    rows["per picture"] = printable(folder / "areas.csv")
    rows["manifest"] = printable(report.manifest)
    rows["time"] = f"{report.seconds:.1f} s" + (f", {rate:.2f} pictures/s" if rate else "")
    print_summary("probe predict", rows, as_json=as_json, payload=payload)
