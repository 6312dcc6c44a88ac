"""Random crops of folders of images, as uint8 arrays [3, H, W]."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


@dataclass(frozen=True)
class Folder:
    """Images below ``path``; ``weight`` sets how often one is drawn, against other folders."""

    path: Path
    weight: float = 1.0

    @staticmethod
    def parse(text: str) -> Folder:
        """``PATH`` or ``PATH:WEIGHT``."""
        path, _, weight = text.rpartition(":")
        return Folder(Path(path), float(weight)) if path else Folder(Path(text))

    def files(self) -> list[Path]:
        """Every image below the folder, sorted; label maps (``labels/``) are left out."""
        files = sorted(
            p
            for p in self.path.rglob("*")
            if p.suffix.lower() in EXTENSIONS and p.parent.name != "labels"
        )
        if not files:
            raise FileNotFoundError(f"no images below {self.path}")
        return files


class Source:
    """Draws random crops of all folders but for ``held_out`` images, which it sets aside."""

    def __init__(self, folders: list[Folder], held_out: int, seed: int):
        choose = random.Random(0)  # the same images whatever the seed of the run
        self.weights = [folder.weight for folder in folders]
        self.files = [folder.files() for folder in folders]
        self.held_out = []
        for i in range(held_out):
            files = self.files[i % len(self.files)]
            self.held_out.append(files.pop(choose.randrange(len(files))))
        self.random = random.Random(seed)

    def draw(self, height: int, width: int) -> np.ndarray:
        """One random crop of one random image: place, size, mirror, colours."""
        rng = self.random
        (files,) = rng.choices(self.files, self.weights)
        with Image.open(rng.choice(files)) as image:
            image = image.convert("RGB")
            box = _box(image, width / height, rng)
            image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return _array(_recolour(image, rng))


def middle(path: Path, height: int, width: int) -> np.ndarray:
    """The largest crop of this shape from the middle of an image."""
    with Image.open(path) as image:
        image = image.convert("RGB")
        w = min(image.width, image.height * width / height)
        h = w * height / width
        left, top = (image.width - w) / 2, (image.height - h) / 2
        box = (left, top, left + w, top + h)
        return _array(image.resize((width, height), Image.Resampling.BICUBIC, box=box))


def _array(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _box(image: Image.Image, aspect: float, rng: random.Random) -> tuple[float, ...]:
    """A random rectangle of about this aspect, with 20 to 100 % of the largest such area."""
    aspect *= 2 ** rng.uniform(-0.4, 0.4)
    side = rng.uniform(0.2, 1.0) ** 0.5
    w = side * min(image.width, image.height * aspect)
    h = w / aspect
    left, top = rng.uniform(0, image.width - w), rng.uniform(0, max(0.0, image.height - h))
    return left, top, left + w, min(image.height, top + h)


def _recolour(image: Image.Image, rng: random.Random) -> Image.Image:
    if rng.random() < 0.05:
        image = image.convert("L").convert("RGB")
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        if rng.random() < 0.6:
            image = enhance(image).enhance(rng.uniform(0.6, 1.5))
    return image
