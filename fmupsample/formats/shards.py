"""Reading what ``fmupsample extract --shard-size`` wrote."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fmupsample.errors import FeaturesError
from fmupsample.formats.array import FeatureArray
from fmupsample.formats.opening import open_part
from fmupsample.images.find import printable


class _Part(NamedTuple):
    """Where a member of a tar file lies."""

    shard: Path
    offset: int
    size: int
    suffix: str


class Shards(Mapping[str, FeatureArray]):
    """Samples of tar files by their keys, in the order in which they lie there.

    Only the tar headers are read at first; ``shards[key]`` maps a sample into memory, and is what
    ``fmupsample.open`` gives for a file. Pickles, so it passes to the workers of a ``DataLoader``.

    Attributes:
        paths: of the tar files.
        device: where results are made.
    """

    def __init__(self, paths: Iterable[str | Path], *, device: torch.device | str = "cpu") -> None:
        self.paths = [Path(path) for path in paths]
        self.device = device
        self._features: dict[str, _Part] = {}
        self._info: dict[str, _Part] = {}
        for path in self.paths:
            self._index(path)

    def _index(self, path: Path) -> None:
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    folder, slash, name = member.name.rpartition("/")
                    stem, dot, suffix = name.partition(".")
                    if not member.isreg() or not dot:
                        continue
                    part = _Part(path, member.offset_data, member.size, dot + suffix)
                    found = self._info if suffix == "json" else self._features
                    found[folder + slash + stem] = part
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            raise FeaturesError(
                f"{printable(path)} is not a readable shard (damaged or cut off?): {error}"
            ) from error

    def __getitem__(self, key: str) -> FeatureArray:
        part = self._features[key]
        shown = f"{printable(part.shard)}, sample {printable(key)}"
        return open_part(*part, shown, self.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._features)

    def __len__(self) -> int:
        return len(self._features)

    def __repr__(self) -> str:
        return f"Shards({len(self)} samples in {len(self.paths)} files)"

    def info(self, key: str) -> dict[str, Any]:
        """What the shard says of a sample: its picture (``source``, ``relative``), sizes, ...

        Raises:
            KeyError: no such sample.
            FeaturesError: damaged.
        """
        part = self._info[key]
        try:
            with part.shard.open("rb") as file:
                file.seek(part.offset)
                found = json.loads(file.read(part.size))
            if not isinstance(found, dict):
                raise ValueError("it is no mapping")
            return found
        except (OSError, ValueError, RecursionError) as error:
            raise FeaturesError(
                f"{printable(part.shard)}: {printable(key)}.json is damaged: {error}"
            ) from error


def open_shards(
    where: str | Path | Iterable[str | Path], *, device: torch.device | str = "cpu"
) -> Shards:
    """The samples of an output folder of ``extract --shard-size``, of one tar file, or of several.

    Shards that a run has not finished are left out.

    Raises:
        FeaturesError: there are none, or one is damaged.
    """
    if not isinstance(where, str | Path):
        return Shards(where, device=device)
    path = Path(where)
    if not path.is_dir():
        return Shards([path], device=device)
    found = sorted(path.glob("features-*.tar"))
    if not found:
        raise FeaturesError(f"there is no shard features-*.tar in {printable(path)}")
    return Shards(found, device=device)
