"""Images whose segments are known exactly: objects, shapes and thin things pasted on photographs.

Silhouettes are those of labelled objects or drawn ones (polygons, ellipses, blobs, poles, wires,
fences); what fills them is the object itself, a part of another photograph, or a colour. Edges are
blended over about a pixel, as a camera does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

IGNORED = 255
MOST = 14  # segments of a composite


@dataclass(frozen=True)
class Labelled:
    """A photograph uint8 ``[H, W, 3]`` and its labels uint8 ``[H, W]``."""

    image: np.ndarray
    labels: np.ndarray
    one_object: bool  # all labels but 0 are parts of one thing


def read_image(path: Path) -> np.ndarray:
    """RGB uint8 ``[H, W, 3]``."""
    return cv2.cvtColor(cv2.imread(str(path), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def read_labelled(folder: Path, one_object: bool) -> list[Labelled]:
    """Everything below ``folder/images`` that has labels of the same name below ``labels``."""
    found = []
    for path in sorted((folder / "images").rglob("*.*")):
        label = (folder / "labels" / path.relative_to(folder / "images")).with_suffix(".png")
        if label.is_file():
            labels = cv2.imread(str(label), cv2.IMREAD_UNCHANGED)
            found.append(Labelled(read_image(path), labels, one_object))
    return found


class Composer:
    """Draws training samples.

    Args:
        groups: labelled photographs; each group is drawn from equally often.
        photos: files of further photographs.
        side: of a sample, pixels.
        labelled_share: of the samples whose background is a labelled photograph.
        pasted_share: of those that something is pasted onto.
    """

    def __init__(
        self,
        groups: list[list[Labelled]],
        photos: list[Path],
        side: int,
        *,
        labelled_share: float = 0.6,
        pasted_share: float = 0.5,
    ) -> None:
        self.groups, self.photos, self.side = groups, photos, side
        self.labelled_share = labelled_share if groups else 0.0
        self.pasted_share = pasted_share

    def __call__(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """An image uint8 ``[S, S, 3]`` and its segments uint8 ``[S, S]``, 255 where unknown."""
        labelled = rng.random() < self.labelled_share
        if labelled:
            image, labels = self._labelled_crop(rng)
        else:
            image, labels = self._photo(rng), np.zeros((self.side, self.side), np.uint8)
        if not labelled or rng.random() < self.pasted_share:
            for number in range(rng.integers(1, 7)):
                image, labels = self._paste(rng, image, labels, MOST + 1 + number)
        return _as_a_camera(rng, image), labels

    # -- what is seen -----------------------------------------------------------------------------

    def _labelled_crop(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        group = self.groups[rng.integers(len(self.groups))]
        chosen = group[rng.integers(len(group))]
        rows, columns = _square(rng, chosen.labels.shape, 0.4)
        image = _resized(chosen.image[rows, columns], self.side)
        labels = cv2.resize(
            chosen.labels[rows, columns], (self.side,) * 2, interpolation=cv2.INTER_NEAREST
        )
        if rng.random() < 0.5:
            image, labels = image[:, ::-1], labels[:, ::-1]
        return np.ascontiguousarray(image), np.ascontiguousarray(labels)

    def _photo(self, rng: np.random.Generator, smallest: float = 0.4) -> np.ndarray:
        image = read_image(self.photos[rng.integers(len(self.photos))])
        rows, columns = _square(rng, image.shape[:2], smallest)
        image = _resized(image[rows, columns], self.side)
        return np.ascontiguousarray(image[:, ::-1]) if rng.random() < 0.5 else image

    def _paste(
        self, rng: np.random.Generator, image: np.ndarray, labels: np.ndarray, number: int
    ) -> tuple[np.ndarray, np.ndarray]:
        texture = None
        if self.groups and rng.random() < 0.4:
            alpha, texture = self._silhouette(rng)
        else:
            alpha = _shape(rng, self.side)
        if texture is None or rng.random() < 0.4:
            texture = self._texture(rng, image)
        texture = _recoloured(rng, texture, 0.25)
        sigma = rng.uniform(0, 0.9)
        if sigma > 0.3:
            alpha = cv2.GaussianBlur(alpha, (0, 0), sigma)
        share = alpha[:, :, None].astype(np.float32) / 255
        image = (image * (1 - share) + texture * share).round().astype(np.uint8)
        return image, np.where(alpha > 127, np.uint8(number), labels)

    def _texture(self, rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
        kind = rng.random()
        if kind < 0.6:
            return self._photo(rng, 0.1)
        if kind < 0.75:  # the same photograph, turned: what hides best
            return np.ascontiguousarray(np.rot90(image, rng.integers(1, 4)))
        colour = rng.uniform(0, 255, 3)
        slope = rng.uniform(-60, 60, (2, 1, 1, 3))
        ramp = np.linspace(-0.5, 0.5, self.side)
        flat = colour + ramp[:, None, None] * slope[0] + ramp[None, :, None] * slope[1]
        flat = flat + rng.normal(0, rng.uniform(0, 12), (self.side, self.side, 1))
        return flat.clip(0, 255).astype(np.uint8)

    def _silhouette(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Alpha uint8 ``[S, S]`` of a labelled object somewhere, and its own texture there."""
        while True:
            group = self.groups[rng.integers(len(self.groups))]
            chosen = group[rng.integers(len(group))]
            whole = chosen.one_object and rng.random() < 0.7
            labels = (chosen.labels != 0).astype(np.uint8) if whole else chosen.labels
            y, x = rng.integers(labels.shape[0]), rng.integers(labels.shape[1])
            label = labels[y, x]
            if label == IGNORED or (chosen.one_object and label == 0):
                continue
            mask = (labels == label).astype(np.uint8)
            _, parts, boxes, _ = cv2.connectedComponentsWithStats(mask)
            left, top, width, height, area = boxes[parts[y, x]]
            if min(width, height) < 12 or area < 150:
                continue
            box = np.s_[top : top + height, left : left + width]
            mask = (parts[box] == parts[y, x]).astype(np.uint8) * 255
            return self._placed(rng, mask, chosen.image[box])

    def _placed(
        self, rng: np.random.Generator, mask: np.ndarray, image: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """A cut-out scaled, turned and moved to somewhere in the sample."""
        height, width = mask.shape
        scale = self.side * np.exp(rng.uniform(np.log(0.12), np.log(1.1))) / max(height, width)
        angle, stretch = rng.normal(0, 12), np.exp(rng.normal(0, 0.15))
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), angle, scale)
        matrix[0] *= stretch * rng.choice([-1, 1])
        centre = matrix @ [width / 2, height / 2, 1]
        matrix[:, 2] += rng.uniform(0, self.side, 2) - centre
        if scale < 0.5:  # not to alias
            sigma = 0.4 / scale
            mask, image = (cv2.GaussianBlur(x, (0, 0), sigma) for x in (mask, image))
        size = (self.side, self.side)
        alpha = cv2.warpAffine(mask, matrix, size, flags=cv2.INTER_LINEAR)
        texture = cv2.warpAffine(
            image, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
        )
        return alpha, texture


def _square(
    rng: np.random.Generator, shape: tuple[int, int], smallest: float
) -> tuple[slice, slice]:
    """Rows and columns of a random square of at least ``smallest`` of the shorter side."""
    side = max(16, int(min(shape) * rng.uniform(smallest, 1)))
    side = min(side, *shape)
    top, left = (rng.integers(n - side + 1) for n in shape)
    return slice(top, top + side), slice(left, left + side)


def _resized(image: np.ndarray, side: int) -> np.ndarray:
    shrinks = image.shape[0] > side
    return cv2.resize(
        image, (side, side), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    )


def _shape(rng: np.random.Generator, side: int) -> np.ndarray:
    """Alpha uint8 ``[S, S]`` of something drawn, smooth at its edges."""
    canvas = np.zeros((side, side), np.uint8)
    kind = rng.choice(["line", "curve", "bars", "polygon", "ellipse", "blob"],
                      p=[0.3, 0.12, 0.1, 0.15, 0.13, 0.2])  # fmt: skip
    fixed = 4  # cv2 takes coordinates in sixteenths of a pixel

    def points(n: int, spread: float = 1.0) -> np.ndarray:
        centre = rng.uniform(0, side, 2)
        return (centre + rng.normal(0, spread * side / 3, (n, 2))) * 2**fixed

    width = int(np.exp(rng.uniform(0, np.log(side / 10)))) + 1
    if kind == "line":
        upright = rng.random() < 0.6
        start = rng.uniform(-0.1, 1.1, 2) * side
        length = side * rng.uniform(0.15, 1.2)
        angle = np.pi / 2 + rng.normal(0, 0.08) if upright else rng.uniform(0, np.pi)
        end = start + length * np.array([np.cos(angle), np.sin(angle)])
        a, b = ((p * 2**fixed).round().astype(int).tolist() for p in (start, end))
        cv2.line(canvas, a, b, 255, width, cv2.LINE_AA, fixed)
    elif kind == "curve":
        corners = np.cumsum(rng.normal(0, side * 0.25, (4, 2)), 0) + rng.uniform(0, side, 2)
        t = np.linspace(0, 1, 24)[:, None]
        curve = ((1 - t) ** 3 * corners[0] + 3 * t * (1 - t) ** 2 * corners[1]
                 + 3 * t**2 * (1 - t) * corners[2] + t**3 * corners[3])  # fmt: skip
        curve = (curve * 2**fixed).round().astype(np.int32)[:, None]
        cv2.polylines(canvas, [curve], False, 255, width, cv2.LINE_AA, fixed)
    elif kind == "bars":
        period, thick = rng.uniform(8, side / 3), rng.uniform(0.1, 0.5)
        angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 1)
        y, x = np.mgrid[:side, :side]
        wave = ((np.cos(angle) * x + np.sin(angle) * y) / period + phase) % 1
        ramp = (thick / 2 - np.abs(wave - 0.5)) * period + 0.5
        region = np.zeros_like(canvas)
        hull = cv2.convexHull((points(6) / 2**fixed).astype(np.float32)).astype(np.int32)
        cv2.fillConvexPoly(region, hull, 1)
        canvas = (ramp.clip(0, 1) * 255).astype(np.uint8) * region
    elif kind == "polygon":
        corners = points(rng.integers(3, 8), rng.uniform(0.2, 1)).round().astype(np.int32)
        cv2.fillPoly(canvas, [corners[:, None]], 255, cv2.LINE_AA, fixed)
    elif kind == "ellipse":
        centre = (rng.uniform(0, side, 2) * 2**fixed).astype(int).tolist()
        axes = (np.exp(rng.uniform(np.log(3), np.log(side / 2.2), 2)) * 2**fixed).astype(int)
        turn = rng.uniform(0, 180)
        cv2.ellipse(canvas, centre, axes.tolist(), turn, 0, 360, 255, -1, cv2.LINE_AA, fixed)
    else:
        coarse = rng.normal(0, 1, (rng.integers(3, 12),) * 2).astype(np.float32)
        field = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
        canvas = ((field - rng.uniform(0.2, 0.9)) * side / 4).clip(-0.5, 0.5) + 0.5
        canvas = (canvas * 255).astype(np.uint8)
    return canvas


def _recoloured(rng: np.random.Generator, image: np.ndarray, strength: float) -> np.ndarray:
    """Other brightness, contrast, saturation and tint."""
    gain, shift = np.exp(rng.normal(0, strength)), rng.normal(0, 60 * strength)
    mean = np.array(cv2.mean(image)[:3])
    saturation = rng.uniform(1 - 2 * strength, 1 + strength)
    tint = np.exp(rng.normal(0, strength / 4, 3))[:, None]
    mix = tint * gain * (saturation * np.eye(3) + (1 - saturation) / 3)
    moved = tint[:, 0] * ((1 - gain) * mean + shift)
    return cv2.transform(image, np.column_stack([mix, moved]))


def _as_a_camera(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Light, blur, noise and compression of the whole sample."""
    image = _recoloured(rng, image, 0.2) if rng.random() < 0.8 else image
    if rng.random() < 0.2:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.3))
    if rng.random() < 0.25:
        noise = rng.normal(0, rng.uniform(1, 10), image.shape)
        image = (image + noise).clip(0, 255).astype(np.uint8)
    if rng.random() < 0.3:
        quality = int(rng.integers(35, 95))
        _, packed = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
        image = cv2.imdecode(packed, cv2.IMREAD_COLOR)
    return image
