"""A head for any backbone on backbones that it never saw.

    python research/benchmarks/leave_one_out.py --sources DIR --photos DIR --camvid DIR -o FOLDER

For each feature source, a universal head is trained on all the others, and one of its own on this
source alone, with equal steps; then linear probes on CamVid compare both with bilinear and joint
bilateral upsampling (`quality.py`). Sources are the backbone files in DIR (see
`research/recipes/train_source.py`) and the embedded backbone; two layers of one file are left out
together. A run that was stopped goes on when it is given the same folder. Written are the heads, a
JSON of `quality.py` for each source, and `leave_one_out.md`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import quality
from common import options, parse_options, tell_faults, write_text
from fmupsample.backbones import Backbone, load_backbone
from fmupsample.errors import UsageError
from fmupsample.images.find import find_images
from fmupsample.training.config import TrainConfig
from fmupsample.training.run import train
from fmupsample_cli.progress import RichProgress, note
from tables import markdown_table, with_spread

# What is compared, and how (keys of a cell in the JSON of quality.py).
NAMES = ("bilinear", "jbu", "universal", "specialised")
MEASURES = {
    ("preserved", "miou"): "preserved: mIoU",
    ("preserved", "boundary_f"): "preserved: boundary F",
    ("fitted", "miou"): "fitted: mIoU",
    ("fitted", "boundary_f"): "fitted: boundary F",
}


@dataclass(frozen=True)
class Source:
    """A file of a backbone (``None``: the embedded one) and one of its layers."""

    file: Path | None
    layer: str | None = None

    @property
    def name(self) -> str:
        stem = "embedded" if self.file is None else self.file.stem
        return stem if self.layer is None else f"{stem}-layer{self.layer}"

    def load(self) -> Backbone:
        return load_backbone("embedded", weights=self.file, layer=self.layer)

    def options(self) -> list[str]:
        """The same for `quality.py`."""
        weights = [] if self.file is None else ["--backbone-weights", str(self.file)]
        return weights + ([] if self.layer is None else ["--layer", self.layer])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = options(__doc__, "folder for heads and results", required=True)
    add = parser.add_argument
    add("--sources", type=Path, required=True, help="folder of backbone files")
    add("--photos", type=Path, required=True, help="folder of pictures to train on")
    add("--camvid", type=Path, required=True, help="folder with train/ and val/")
    add("--layers", nargs="*", default=[], metavar="NAME=N",
        help="more layers of these sources to train on")  # fmt: skip
    add("--held-out", nargs="*", metavar="NAME", help="sources to leave out, one at a time (all)")
    add("--only", choices=["train", "judge"], help="do a part")
    add("--steps", type=int, default=150, help="of every head (150)")
    add("--batch-size", type=int, default=2)
    add("--cells", type=int, default=12, help="of the sources, along the side of a crop (12)")
    add("--enlarge", type=int, default=3, help="how much larger crops teach (3)")
    add("--lr", type=float, default=3e-3)
    add("--precision", default="bf16", help="of the sources in training (bf16)")
    add("--seed", type=int, default=0, help="of training")
    add("--probe-size", type=int, default=224, help="short side of CamVid's pictures (224)")
    add("--limits", type=int, nargs=2, default=[80, 40], help="of CamVid train and val (80 40)")
    add("--epochs", type=int, default=10, help="of a probe (10)")
    add("--rates", nargs="+", default=["0.1", "0.3"], help="learning rates to choose from")
    add("--seeds", type=int, default=2, help="of the probes (2)")
    return parse_options(parser, arguments)


def find_sources(folder: Path, layers: Sequence[str]) -> list[Source]:
    """The embedded backbone and every file, and then the further layers."""
    files: dict[str, Path | None] = {"embedded": None}
    files |= {path.stem: path for path in sorted(folder.glob("*.safetensors"))}
    more = []
    for text in layers:
        name, _, layer = text.partition("=")
        if name not in files or not layer:
            raise UsageError(f"--layers {text!r} is not understood; sources: {', '.join(files)}")
        more.append(Source(files[name], layer))
    return [Source(path) for path in files.values()] + more


def train_head(
    path: Path, sources: Sequence[Source], args: argparse.Namespace, *, universal: bool
) -> None:
    """A head in ``path``, unless it is there; a run that was stopped goes on."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    backbones = [source.load() for source in sources]
    size = args.cells * backbones[0].stride[0]
    config = TrainConfig(
        upsampler="bilateral-cells",
        upsampler_config={"channels": 0} if universal else {},
        image_sizes=(size,),
        side=320,
        steps=args.steps,
        batch_size=args.batch_size,
        enlarge=args.enlarge,
        lr=args.lr,
        precision=args.precision,
        seed=args.seed,
        held_out=0,  # the last weights, for all alike
        previews=0,
    )
    with RichProgress(unit="steps") as progress:
        report = train(
            backbones,
            find_images([args.photos]),
            path,
            config,
            resume=True,
            progress=progress,
        )
    note(f"{path.stem}: {report.parameters} parameters, {report.seconds:.0f} s")


def judge(source: Source, heads: dict[str, Path], args: argparse.Namespace) -> list[dict]:
    """The cells of `quality.py` for one source."""
    output = args.output / f"{source.name}.json"
    quality.main([
        "--camvid", str(args.camvid), "--image-size", str(args.probe_size),
        "--limits", *map(str, args.limits), "--seeds", str(args.seeds), *source.options(),
        "--epochs", str(args.epochs), "--rates", *args.rates,
        "--upsamplers", "bilinear", "jbu", "-o", str(output), "--threads", str(args.threads),
        *(f"--head={name}={path}" for name, path in heads.items()),
    ])  # fmt: skip
    return json.loads(output.read_text())["cells"]


def table(found: dict[str, list[dict]]) -> str:
    """A row for each source and upsampler; then what share of a head's own gain is kept."""
    rows = []
    for source, cells in found.items():
        for name in NAMES:
            values = [with_spread(_numbers(cells, name, key)) for key in MEASURES]
            rows.append([source, name, *values])
    gains = {}
    for name in ("universal", "specialised"):
        gains[name] = [
            mean(_gain(cells, name, key) for cells in found.values()) for key in MEASURES
        ]
        rows.append(["*mean gain*", name, *(f"{gain:+.1f}" for gain in gains[name])])
    shares = (
        f"{100 * one / own:.0f} %" if own > 0 else "-"
        for one, own in zip(gains["universal"], gains["specialised"], strict=True)
    )
    rows.append(["*share of the gain*", "universal", *shares])
    return markdown_table(["source", "upsampler", *MEASURES.values()], rows, words=2) + "\n"


def _numbers(cells: list[dict], name: str, key: tuple[str, str]) -> list[float]:
    probe, measure = key
    own = sorted((c for c in cells if c["upsampler"] == name), key=lambda c: c["seed"])
    return [100 * cell[probe][measure] for cell in own]


def _gain(cells: list[dict], name: str, key: tuple[str, str]) -> float:
    """Over bilinear, the mean over seeds."""
    return mean(_numbers(cells, name, key)) - mean(_numbers(cells, "bilinear", key))


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    sources = find_sources(args.sources, args.layers)
    first = [source for source in sources if source.layer is None]
    left_out = [s for s in first if args.held_out is None or s.name in args.held_out]
    if len(first) < 2 or not left_out:
        raise UsageError(f"sources: {', '.join(s.name for s in first)}; none to leave out")
    found = {}
    for source in left_out:
        others = [other for other in sources if other.file != source.file]
        heads = {
            "universal": args.output / "heads" / f"without-{source.name}.safetensors",
            "specialised": args.output / "heads" / f"{source.name}.safetensors",
        }
        if args.only != "judge":
            train_head(heads["universal"], others, args, universal=True)
            train_head(heads["specialised"], [source], args, universal=False)
        if args.only != "train":
            found[source.name] = judge(source, heads, args)
    if found:
        text = table(found)
        write_text(args.output / "leave_one_out.md", text)
        print(text)


if __name__ == "__main__":
    tell_faults(main)
