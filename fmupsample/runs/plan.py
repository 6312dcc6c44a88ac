"""What a run will do, decided before it starts: which results, how large, what is there already."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from fmupsample.errors import ImageError, OutputError, UsageError
from fmupsample.images.find import printable
from fmupsample.runs.job import Job, Recipe, Task
from fmupsample.runs.manifest import Manifest, Record
from fmupsample.upsamplers.registry import names_in_files
from fmupsample.video.frames import size_of
from fmupsample.wording import counted, human_bytes

# What options mean that are only recorded where they differ from it.
_UNSAID = {"views": 1, "global": False}
# Headers read for the estimate; with more images, evenly spaced ones stand for the rest.
_SAMPLE = 1000


@dataclass
class Plan:
    """What is to be done.

    Attributes:
        tasks: results to make.
        skipped: records of those that are there.
        moves: files (old name, new record) whose name is another one among today's images.
        replaced: bytes of the files that will be replaced.
    """

    tasks: list[Task] = field(default_factory=list)
    skipped: list[Record] = field(default_factory=list)
    moves: list[tuple[PurePosixPath, Record]] = field(default_factory=list)
    replaced: int = 0


def refuse_other_options(out: Path, manifest: Manifest, recipe: Recipe) -> None:
    """Raise a UsageError for finished results that were made with other options.

    Those of the same upsampler under an earlier name count as made with these.
    """
    for record in manifest.records.values():
        if record["status"] != "ok" or record.get("options_hash") == recipe.hash:
            continue
        before = record.get("options") if isinstance(record.get("options"), dict) else {}
        name = recipe.options.get("upsampler")
        renamed = {**before, "upsampler": name} == recipe.options
        if renamed and before.get("upsampler") in names_in_files(name):
            record |= {"options": recipe.options, "options_hash": recipe.hash}
            continue
        raise UsageError(
            f"{printable(out)} holds results made with other options: "
            f"{', '.join(_differences(before, recipe.options)[:4])}; choose another output folder, "
            "or --overwrite"
        )


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """``"dtype fp16 (now fp32)"`` ..."""
    keys = [*now, *(key for key in before if key not in now)]
    before, now = {**_UNSAID, **before}, {**_UNSAID, **now}
    changed = {key for key in keys if before.get(key) != now.get(key)}
    for model in ("backbone", "upsampler"):
        if model in changed:  # another model has other weights: no need to say so
            changed.discard(f"{model}_fingerprint")
    if "views" in changed:
        changed.discard("backbone_fingerprint")
    return [
        f"{key.replace('_', ' ')} {before.get(key)} (now {now.get(key)})"
        for key in keys
        if key in changed
    ]


def estimate(plan: Plan, job: Job, out: Path) -> str:
    """What a run will do and how much space that takes, as a sentence.

    Raises:
        OutputError: the results will not fit on the disk.
    """
    todo, note = len(plan.tasks), job.note(len(plan.tasks))
    if not todo:
        return "nothing to do: all results are there"
    step = max(1, -(-todo // _SAMPLE))
    looked_at = plan.tasks[::step]
    sizes = []
    for task in looked_at:
        with contextlib.suppress(ImageError):  # it will be reported when its turn comes
            sizes.append(size_of(task.source))

    def needed(job: Job) -> int | None:
        total = 0
        for size in sizes:
            with contextlib.suppress(ImageError):
                if (each := job.bytes_of(size)) is None:
                    return None
                total += each
        return round(total / len(looked_at) * todo)  # unreadable ones take nothing

    total = needed(job) if job.bytes_of((32, 32)) is not None else None
    if total is None:
        return f"{counted(todo, 'picture')} to do, {len(plan.skipped)} finished before{note}"
    free = shutil.disk_usage(out).free
    if total > free + plan.replaced:
        smaller = ", ".join(
            f"{words}: {human_bytes(needed(other) or 0)}"
            for words, other in job.smaller_ways().items()
        )
        raise OutputError(
            f"the results need {human_bytes(total)}, but {printable(out)} has {human_bytes(free)} "
            f"free; nothing was started. Smaller: {smaller}"
        )
    return (
        f"{counted(todo, 'picture')}, {'about ' if step > 1 else ''}{human_bytes(total)} in "
        f"{job.recipe().options['dtype']} ({human_bytes(total // todo)} each); "
        f"{human_bytes(free)} free{note}"
    )
