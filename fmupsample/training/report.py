"""What a run tells and shows: a summary, a log, a curve, pictures of held-out features."""

from __future__ import annotations

import importlib.util
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fmupsample.atomic import replacing
from fmupsample.backbones.views import title
from fmupsample.draw.panel import Tile, draw_panel
from fmupsample.draw.pca import PCABasis
from fmupsample.errors import OutputError
from fmupsample.images.find import printable
from fmupsample.training.config import TrainConfig
from fmupsample.training.feed import Feed
from fmupsample.training.pictures import Pictures
from fmupsample.training.validate import Score
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.classic import Bilinear

LOG, CURVE, PREVIEWS = "log.jsonl", "curve.png", "previews"


@dataclass
class TrainReport:
    """What became of a run.

    Attributes:
        output: the head file.
        score: held-out losses of the weights in it; ``None`` without validation pictures.
        best_step: after how many steps those weights were taken.
        pictures, held_out: how many were trained and validated on.
        seconds: of training, with validations, over all interruptions.
        leads: false in processes that only helped: they have nothing to tell.
    """

    output: Path
    work: Path
    config: TrainConfig
    parameters: int
    pictures: int
    held_out: int
    best_step: int = 0
    score: Score | None = None
    seconds: float = 0.0
    resumed_at: int = 0
    card: dict[str, Any] = field(default_factory=dict)
    leads: bool = True

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON summary."""
        return {
            "output": printable(self.output),
            "work": printable(self.work),
            "upsampler": self.config.upsampler,
            "parameters": self.parameters,
            "pictures": self.pictures,
            "held_out_pictures": self.held_out,
            "steps": self.config.steps,
            "resumed_at": self.resumed_at,
            "best_step": self.best_step,
            "held_out": None if self.score is None else self.score.to_json(),
            "better_than_bilinear": None if self.score is None else self.score.better,
            "seconds": round(self.seconds, 1),
            "seconds_per_step": round(self.seconds / self.config.steps, 4),
            "config": self.config.to_dict(),
        }


class Log:
    """One JSON object a line: ``{"step", "loss", ...}`` and, at validations, ``{"step", "held_out":
    {...}}``. Steps are counted as done: the first has number 1."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, step: int) -> None:
        """Keep what was written up to ``step``: the rest belongs to steps that are done again."""
        kept = [record for record in self.read() if record["step"] <= step]
        self._write("".join(json.dumps(record) + "\n" for record in kept), "w")

    def add(self, record: dict[str, Any]) -> None:
        """Append one record."""
        clean = {k: v if not _odd(v) else str(v) for k, v in record.items()}
        self._write(json.dumps(clean) + "\n", "a")

    def read(self) -> list[dict[str, Any]]:
        """All whole records; a last line that a kill cut off is left out."""
        if not self.path.is_file():
            return []
        records = []
        for line in self.path.read_text("utf-8", "replace").split("\n"):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
        return records

    def _write(self, text: str, mode: str) -> None:
        try:
            with self.path.open(mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise OutputError(
                f"the log {self.path} cannot be written: {error.strerror or error}"
            ) from error


def _odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def can_draw_curves() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_curve(records: Sequence[dict[str, Any]], steps: int) -> bytes:
    """The training loss and the held-out loss (bilinear interpolation is 1) over the steps: PNG."""
    from matplotlib import style
    from matplotlib.figure import Figure

    loss = [(r["step"], r["loss"]) for r in records if isinstance(r.get("loss"), int | float)]
    held = [(r["step"], r["held_out"]["vs_bilinear"]) for r in records if "held_out" in r]
    with style.context("default"):  # settings of the current folder do not count
        figure = Figure((9.6, 6), layout="constrained")
        upper, lower = figure.subplots(2, sharex=True)
        upper.set(title="training loss", xlim=(0, steps))
        lower.set(title="held-out loss, as a share of bilinear interpolation's", xlabel="step")
        if loss:
            upper.plot(*zip(*loss, strict=True), color="0.7", linewidth=1)
            upper.plot(*zip(*_smoothed(loss), strict=True), linewidth=2)
        if held:
            lower.plot(*zip(*held, strict=True), "o-", markersize=4)
        lower.axhline(1, color="black", linestyle="--")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    reach = max(1, len(points) // 40)
    values = [value for _, value in points]
    return [
        (step, float(np.mean(values[max(0, i - reach) : i + reach + 1])))
        for i, (step, _) in enumerate(points)
    ]


class Previews:
    """Some held-out squares, whole; one after another of the backbones.

    Args:
        pictures: the held-out ones; count: how many of them, at most; side: about, pixels.
    """

    def __init__(self, feeds: Sequence[Feed], pictures: Pictures, count: int, side: int) -> None:
        count = min(count, len(pictures))
        squares = range(0, len(pictures), -(-len(pictures) // count)) if count else ()
        # Of each the feed, and what Feed.view gives.
        self._chosen = [
            (feed := feeds[n % len(feeds)], *feed.view(pictures.load(square), side))
            for n, square in enumerate(squares)
        ]
        # The colours are those of all squares of a backbone together.
        self._bases: dict[Feed, PCABasis] = {}
        for feed in {feed: None for feed, *_ in self._chosen}:
            own = [features[0].flatten(1).T for f, _, _, features in self._chosen if f is feed]
            self._bases[feed] = PCABasis.fit(torch.cat(own))

    def draw(self, folder: Path, head: Upsampler, step: int, steps: int) -> None:
        """A panel of each square with what ``head`` makes of it after ``step`` of ``steps``."""
        head.eval()
        for number, (feed, pixels, image, features) in enumerate(self._chosen, 1):
            head.use_with(feed.backbone.mean, feed.backbone.std)
            note = f"{title(feed.backbone)}, step {step} of {steps}"
            panel = _draw_panel(pixels, image, features, head, self._bases[feed], note)
            buffer = io.BytesIO()
            Image.fromarray(panel).save(buffer, format="png")
            save_picture(folder / f"step-{step:06}-{number}.png", buffer.getvalue())


@torch.no_grad()
def _draw_panel(
    pixels: np.ndarray,
    image: Tensor,
    features: Tensor,
    head: Upsampler,
    basis: PCABasis,
    note: str,
) -> np.ndarray:
    """The picture, its features upsampled bilinearly, and by the head, as PCA colours.

    Args:
        pixels: uint8 ``[H, W, 3]``.
        image: the same, normalised, ``[1, 3, H, W]``; features: ``[1, C, h, w]``.
    """
    scores = basis.apply(features)
    plain = Bilinear()(scores, size=image.shape[-2:])
    if head.linear_in_value:
        sharp = head.reassemble(head.kernels(features, image), scores)
    else:
        sharp = basis.apply(head(features, image))
    tiles = [
        Tile("Picture", pixels),
        Tile("Bilinear", basis.to_rgb(plain[0])),
        Tile(head.name, basis.to_rgb(sharp[0])),
    ]
    return draw_panel(tiles, note=note, columns=3).pixels


def save_picture(path: Path, data: bytes) -> None:
    """Write an encoded picture.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
