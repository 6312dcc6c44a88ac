"""Read folders of pictures into one array of uint8 squares, small enough to stay in memory (or on a
GPU)."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


@dataclass
class PictureSet:
    """All training pictures as squares, and a class per square where its folder names one."""

    squares: torch.Tensor  # [N, 3, S, S] uint8, RGB; memory-mapped when it comes from a cache
    labels: torch.Tensor  # [N] int64, -1 where the picture has no class
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.squares)


def list_pictures(folder: Path) -> list[Path]:
    """Every picture below `folder`, in a stable order."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS)
    if not files:
        raise FileNotFoundError(f"no pictures ({', '.join(sorted(EXTENSIONS))}) below {folder}")
    return files


def squares_of(path: Path, side: int) -> list[np.ndarray]:
    """Shrink a picture to short side `side` and cut squares: one, or both ends of an oblong one.

    Both ends together show nearly the whole of a 3:2 picture, so nothing is lost to the centre
    crop.
    """
    with Image.open(path) as image:
        image = image.convert("RGB")
        width, height = image.size
        scale = side / min(width, height)
        width, height = max(side, round(width * scale)), max(side, round(height * scale))
        array = np.asarray(
            image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
        )
    array = array.transpose(2, 0, 1)
    if max(width, height) < 1.15 * side:
        top, left = (height - side) // 2, (width - side) // 2
        return [array[:, top : top + side, left : left + side]]
    return [array[:, :side, :side], array[:, -side:, -side:]]


def load_pictures(
    folders: list[Path], labelled: list[Path], side: int, cache: Path | None = None
) -> PictureSet:
    """Load `folders` and `labelled` (class = name of the sub-folder) as squares of `side` pixels.

    With `cache` the decoded squares are kept there as .npy files and memory-mapped next time; the
    key covers the file names, their sizes and `side`, so a changed folder is decoded again.
    """
    class_names = sorted(
        {f"{root.name}/{p.name}" for root in labelled for p in root.iterdir() if p.is_dir()}
    )
    index = {name: i for i, name in enumerate(class_names)}
    jobs: list[tuple[Path, int]] = []
    for root in labelled:
        jobs += [
            (p, index[f"{root.name}/{p.relative_to(root).parts[0]}"]) for p in list_pictures(root)
        ]
    for root in folders:
        jobs += [(p, -1) for p in list_pictures(root)]

    key = hashlib.sha256(
        repr([side, [(str(p), p.stat().st_size, c) for p, c in jobs]]).encode()
    ).hexdigest()[:16]
    stored = cache / f"squares-{key}.npy" if cache else None
    if stored and stored.exists():
        squares = np.load(
            stored, mmap_mode="r+"
        )  # r+ only because torch wants a writable array; never written
        labels = np.load(cache / f"labels-{key}.npy")
    else:
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            cut = list(pool.map(lambda job: squares_of(job[0], side), jobs))
        squares = np.stack([square for group in cut for square in group])
        labels = np.array(
            [c for (_, c), group in zip(jobs, cut, strict=True) for _ in group], dtype=np.int64
        )
        if stored:
            cache.mkdir(parents=True, exist_ok=True)
            np.save(cache / f"labels-{key}.npy", labels)
            partial = cache / f"partial-{os.getpid()}.npy"
            np.save(partial, squares)
            partial.replace(stored)
    return PictureSet(torch.from_numpy(squares), torch.from_numpy(labels), class_names)
