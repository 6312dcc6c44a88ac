"""What a folder of very many pictures costs before the first of them is computed, and after.

    python research/benchmarks/folders.py --pictures 100000 -o folders.json

The pictures are hard links to one tiny file, a thousand in a folder; the results of the "done" run
are hard links too, with a manifest that has them all. Timed, each as the commands do it: listing,
naming, reading the manifest, and a whole run of ``extract`` that finds everything finished, for
files and for shards. Also the same with the last picture missing, which is a run that resumes.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from PIL import Image

from common import options, parse_options, tell_faults, write_json
from fmupsample.backbones import load_backbone
from fmupsample.bench.machine import describe
from fmupsample.images import find_images, storable
from fmupsample.images.names import output_names
from fmupsample.jobs.extract import ExtractOptions, extract
from fmupsample.pipeline import Pipeline
from fmupsample.runs.manifest import Manifest
from fmupsample.upsamplers import load_upsampler

EACH = 1000  # pictures in a folder


def link(one: Path, count: int, name: Callable[[int], Path]) -> None:
    """``count`` names for one file; a new copy where the file system allows no more links."""
    for i in range(count):
        path = name(i)
        if i % EACH == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
        if i % 30_000 == 0 and i:
            copy = one.with_name(f"{one.stem}-{i}{one.suffix}")
            copy.write_bytes(one.read_bytes())
            os.utime(copy, ns=(one.stat().st_atime_ns, one.stat().st_mtime_ns))
            one = copy
        os.link(one, path)


def pretend_done(pipeline: Pipeline, work: Path, out: Path, shard_size: int | None) -> None:
    """All results, as if ``extract`` had made them: one that it made, again and again."""
    sources = find_images([work / "in"])
    first = work / f"first-{shard_size}"
    extract(pipeline, sources[:1], first, _options(shard_size))
    record = json.loads((first / "manifest.jsonl").read_text())
    made = first / record["output"]
    out.mkdir()
    names = output_names(sources, ".safetensors")
    size = shard_size or 1
    if shard_size is None:
        link(made, len(sources), lambda i: out / names[i])
    else:
        for n in range(-(-len(sources) // size)):
            held = min(size, len(sources) - n * size)
            with (out / f"features-{n:06}.tar").open("wb") as tar:
                tar.truncate(held * record["bytes"] + 1024)  # nobody looks into it
    with (out / "manifest.jsonl").open("w") as file:
        for i, source in enumerate(sources):
            mine = {"source": storable(source.absolute), "relative": storable(source.relative)}
            if shard_size is None:
                mine["output"] = str(names[i])
            else:
                mine["output"] = f"features-{i // size:06}.tar"
                mine |= {"key": f"k{i}", "offset": i % size * record["bytes"]}
            file.write(json.dumps({**record, **mine}, separators=(",", ":")) + "\n")


def _options(shard_size: int | None) -> ExtractOptions:
    return ExtractOptions(tokens_only=True, shard_size=shard_size)


def timed(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Seconds by the clock and of the processor, the medians."""
    clock, processor = [], []
    for _ in range(repeats):
        began = time.perf_counter(), time.process_time()
        work()
        clock.append(time.perf_counter() - began[0])
        processor.append(time.process_time() - began[1])
    return round(median(clock), 3), round(median(processor), 3)


def measure(
    work: Path, count: int, shard_size: int, repeats: int
) -> dict[str, tuple[float, float]]:
    backbone = load_backbone("embedded")
    pipeline = Pipeline(backbone, load_upsampler(backbone, "nearest"), device="cpu")
    (work / "one").mkdir()
    Image.new("RGB", (32, 32), (200, 60, 40)).save(work / "one/one.png")
    link(work / "one/one.png", count, lambda i: work / f"in/{i // EACH:04}/{i:07}.png")
    sources = find_images([work / "in"])
    assert len(sources) == count
    results = {
        "list": timed(lambda: find_images([work / "in"]), repeats),
        "name": timed(lambda: output_names(sources, ".safetensors"), repeats),
    }
    for way, size in (("files", None), ("shards", shard_size)):
        out, options = work / way, _options(size)
        pretend_done(pipeline, work, out, size)
        results[f"{way}: read the manifest"] = timed(lambda out=out: Manifest(out), repeats)

        def again(out: Path = out, options: ExtractOptions = options, expected: int = 0) -> None:
            report = extract(pipeline, sources, out, options)
            assert len(report.skipped) == count - expected and len(report.done) == expected

        results[f"{way}: a run that finds all done"] = timed(again, repeats)
        last = json.loads((out / "manifest.jsonl").read_text().splitlines()[-1])
        if size is None:
            (out / last["output"]).unlink()
            results[f"{way}: a run that does the last"] = timed(lambda: again(expected=1), 1)
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__, "JSON")
    add = parser.add_argument
    add("--pictures", type=int, default=100_000)
    add("--shard-size", type=int, default=1000)
    add("--repeats", type=int, default=3)
    add("--folder", type=Path, help="where to make them; default: the folder for temporary files")
    args = parse_options(parser, arguments)
    machine = describe(torch.device("cpu"))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        results = measure(Path(folder), args.pictures, args.shard_size, args.repeats)
    for name, (clock, processor) in results.items():
        print(f"{name:36} {clock:8.2f} s, {processor:.2f} s of the processor")
    found = {"machine": machine, "pictures": args.pictures, "clock_and_cpu_seconds": results}
    write_json(args.output, found)


if __name__ == "__main__":
    tell_faults(main)
