"""Files, names, the manifest, and what a killed run leaves behind."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from fmupsample.atomic import remove_leftovers, replacing, temporary_for
from fmupsample.errors import OutputError, UsageError
from fmupsample.formats.files import DTYPES, FORMATS, check_format
from fmupsample.images.find import Source
from fmupsample.images.names import output_names
from fmupsample.runs.job import Job, Output, Recipe, Task
from fmupsample.runs.lock import FolderLock
from fmupsample.runs.manifest import Manifest
from fmupsample.runs.store import Store
from fmupsample.runs.writer import BackgroundWriter


def map_of(dtype: torch.dtype, channels: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(channels, 3, 7, generator=generator).to(dtype)


def read(path: Path) -> tuple[torch.Tensor, dict[str, str]]:
    if path.suffix == ".npy":
        return torch.from_numpy(np.load(path, allow_pickle=False)), {}
    if path.suffix == ".pt":
        loaded = torch.load(path, weights_only=True)
        return loaded["features"], loaded["meta"]
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("features"), file.metadata()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_formats_round_trip_in_slices(kind: str, dtype: str, tmp_path: Path) -> None:
    if dtype not in FORMATS[kind].dtypes:
        with pytest.raises(UsageError, match=r"npy has no bf16: use --dtype fp32 or fp16"):
            check_format(kind, dtype)
        return
    check_format(kind, dtype)
    value = map_of(DTYPES[dtype])
    meta = {"source": "ä \\udc80", "frame": '{"a": [1]}'}
    path = tmp_path / f"a{FORMATS[kind].suffix}"
    file = FORMATS[kind](path, tuple(value.shape), value.dtype, meta)
    file.append(value[:2])
    file.append(value.transpose(1, 2).contiguous().transpose(1, 2)[2:])  # not contiguous
    file.close()
    got, got_meta = read(path)
    assert got.dtype == value.dtype and torch.equal(got, value)
    assert got_meta in (meta, {})


def test_a_pt_file_holds_the_slice_and_not_what_lies_behind_it(tmp_path: Path) -> None:
    value = map_of(torch.float32, 5000)[:1]
    file = FORMATS["pt"](tmp_path / "a.pt", tuple(value.shape), value.dtype, {})
    file.append(value)
    file.close()
    assert (tmp_path / "a.pt").stat().st_size < 5000


def test_missing_or_wrong_slices_are_an_error(tmp_path: Path) -> None:
    file = FORMATS["npy"](tmp_path / "a", (5, 3, 7), torch.float32, {})
    with pytest.raises(ValueError, match="does not continue"):
        file.append(map_of(torch.float16))
    file.append(map_of(torch.float32)[:4])
    with pytest.raises(ValueError, match="4 of 5 channels"):
        file.close()


@pytest.mark.parametrize("kind", FORMATS)
def test_one_pixel_with_odd_strides(kind: str, tmp_path: Path) -> None:
    value = torch.arange(4.0).as_strided((4, 1, 1), (1, 64, 64))
    file = FORMATS[kind](tmp_path / f"a{FORMATS[kind].suffix}", (4, 1, 1), torch.float32, {})
    file.append(value)
    file.close()
    assert torch.equal(read(tmp_path / f"a{FORMATS[kind].suffix}")[0], value)


def test_safetensors_data_is_aligned(tmp_path: Path) -> None:
    for length in range(9):
        path = tmp_path / "a"
        file = FORMATS["safetensors"](path, (1, 1, 1), torch.float32, {"k": "x" * length})
        file.append(torch.ones(1, 1, 1))
        file.close()
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
        assert read(path)[0].item() == 1


@pytest.mark.parametrize(("kind", "dtype"), [("hdf5", "fp32"), ("npy", "int8")])
def test_unknown_words(kind: str, dtype: str) -> None:
    with pytest.raises(UsageError, match="is unknown: use"):
        check_format(kind, dtype)


# -- names --------------------------------------------------------------------------------------


def named(*paths: str, reserved: tuple[str, ...] = (), suffix: str = ".npy") -> list[str]:
    """Output names of "root:relative" sources."""
    sources = []
    for path in paths:
        root, _, relative = path.rpartition(":")
        sources.append(Source(Path("/data") / root / relative, PurePosixPath(relative)))
    return [str(n) for n in output_names(sources, suffix, reserved=reserved)]


def test_names() -> None:
    assert named("a.jpg", "sub/a.jpg", "b.tar.png", "noext") == [
        "a.npy",
        "sub/a.npy",
        "b.tar.npy",
        "noext.npy",
    ]
    assert named("a.jpg", "a.png", "b.png") == ["a.jpg.npy", "a.png.npy", "b.npy"]
    # the same name from two inputs: the folder above tells them apart
    assert named("x:a.jpg", "y:a.jpg") == ["x/a.npy", "y/a.npy"]
    assert named("x:a.jpg", "x:a.png", "y:a.jpg") == ["x/a.npy", "a.png.npy", "y/a.npy"]
    # folders of the same name: a number, in the order of the paths
    assert named("2/p:a.jpg", "1/p:a.jpg") == ["p/a.jpg~2.npy", "p/a.jpg.npy"]
    # names that the run needs for itself
    assert named("pca.jpg", reserved=("pca.npy",)) == ["pca.jpg.npy"]
    # a file where another result needs a folder
    assert named("a.jpg", "a.npy/b.jpg") == ["a.jpg.npy", "a.npy/b.npy"]


def test_names_that_differ_in_case_or_unicode_form_only() -> None:
    for pair in (("a.jpg", "A.jpg"), ("S/x.jpg", "s/x.jpg"), ("\u00e9.jpg", "e\u0301.jpg")):
        assert len({n.casefold() for n in named(*pair)}) == 2


def test_very_long_names_fit_a_file_system(tmp_path: Path) -> None:
    stems = ["x" * 249 + c for c in "ab"] + ["ü" * 120 + "a"]
    names = named(*(f"{stem}.jpg" for stem in stems))
    assert len(set(names)) == 3
    for name in names:
        assert len(name.encode()) <= 255
        (tmp_path / name).touch()


parts = st.lists(st.sampled_from(["a", "A", "b", "a.npy", "c"]), max_size=2)
relatives = st.builds(
    lambda folders, stem, ext: "/".join([*folders, stem + ext]),
    parts,
    st.sampled_from(["a", "A", "b", "a.jpg", "a~2"]),
    st.sampled_from([".jpg", ".JPG", ".png", ""]),
)
inputs = st.lists(
    st.tuples(st.sampled_from(["x", "y", "1/x"]), relatives), unique=True, max_size=12
)


@given(inputs, st.randoms())
def test_names_are_unique_and_do_not_depend_on_the_order(pairs, random) -> None:
    paths = [f"{root}:{relative}" for root, relative in pairs]
    names = dict(zip(paths, named(*paths, reserved=("b.npy",)), strict=True))
    keys = [n.casefold() for n in names.values()]
    assert len(set(keys)) == len(keys) and "b.npy" not in keys
    parents = {str(p).casefold() for n in names.values() for p in PurePosixPath(n).parents}
    assert not parents.intersection(keys)  # no file where a folder must be
    random.shuffle(paths)
    assert dict(zip(paths, named(*paths, reserved=("b.npy",)), strict=True)) == names


@pytest.mark.parametrize("name", ["...mp4", "..jpg", "....jpg", "sub/...mp4"])
@pytest.mark.parametrize("suffix", ["", ".npy"])
def test_names_of_dots_stay_in_the_folder(name: str, suffix: str) -> None:
    [made] = named(name, suffix=suffix)
    assert ".." not in PurePosixPath(made).parts and str(made) == name + suffix


# -- the manifest ---------------------------------------------------------------------------------


def record(source: str, status: str = "ok", **more: object) -> dict:
    return {"source": source, "status": status, "output": source + ".npy"} | more


def test_an_announcement_is_spent_by_what_was_announced(tmp_path: Path) -> None:
    """In whatever order the parts of several processes are read."""
    first = Manifest(tmp_path)
    first.append(record("a", options_hash="1"))
    first.append(record("a", "pending", options_hash="1"))
    first.append(record("b", "pending", options_hash="1"))
    (tmp_path / "a.npy").write_bytes(b"x")
    (tmp_path / "b.npy").write_bytes(b"x")
    first.close()
    lines = [json.loads(line) for line in first.path.read_text().splitlines()]
    assert [(line["source"], line["status"]) for line in lines] == [("a", "ok"), ("b", "pending")]


def test_manifest_is_appended_and_compacted(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    for line in (record("b", "pending"), record("b"), record("a", "failed"), record("a")):
        manifest.append(line)
    assert len((tmp_path / "manifest.jsonl").read_text().splitlines()) == 4
    manifest.close()
    lines = [json.loads(x) for x in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert lines == [record("a"), record("b")]
    assert Manifest(tmp_path).records == {"a": record("a"), "b": record("b")}
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.jsonl"]


@pytest.mark.parametrize("torn", [b'{"source": "c", "sta', b"{", b"\xff\xfe", b'{"source":"c"'])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: bytes) -> None:
    first = Manifest(tmp_path)
    first.append(record("a"))
    first.close(compact=False)
    with (tmp_path / "manifest.jsonl").open("ab") as file:
        file.write(torn)
    second = Manifest(tmp_path)
    assert set(second.records) == {"a"}
    second.append(record("b"))
    second.close(compact=False)
    assert set(Manifest(tmp_path).records) == {"a", "b"}


def test_records_of_a_million_pictures_share_their_options(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    for source, size in (("a", 1), ("b", 1), ("c", 2)):
        manifest.append(record(source, options={"size": size}, options_hash=str(size)))
    manifest.append(record("d", options={"size": 3}, options_hash="1"))  # a hash that lies
    manifest.close()
    read = Manifest(tmp_path).records
    assert read["a"]["options"] is read["b"]["options"]
    assert [read[s]["options"]["size"] for s in "abcd"] == [1, 1, 2, 3]


@pytest.mark.parametrize(
    "changed",
    [
        {"output": "../x"}, {"output": "/etc/x"}, {"output": 3}, {"output": "a/../../x"},
        {"output": "a\0b"}, {"beside": ["/etc/x"]}, {"beside": "x"}, {"pictures": [1]},
    ],
)  # fmt: skip
def test_a_manifest_that_leaves_the_folder_is_refused(tmp_path: Path, changed: dict) -> None:
    for sound in ({"output": "..a/b..c/...d"}, {"output": None}, {"beside": ["x/y.png"]}):
        (tmp_path / "manifest.jsonl").write_text(json.dumps(record("a", **sound)) + "\n")
        assert Manifest(tmp_path).records["a"]
    (tmp_path / "manifest.jsonl").write_text(json.dumps(record("a", **changed)) + "\n")
    with pytest.raises(UsageError, match="not a manifest of fmupsample"):
        Manifest(tmp_path)


@pytest.mark.parametrize("line", ["not json", '{"image": "a.jpg"}', "[1]", '{"source": 3}'])
def test_a_manifest_of_someone_else_is_left_alone(tmp_path: Path, line: str) -> None:
    (tmp_path / "manifest.jsonl").write_text(line + "\n")
    with pytest.raises(UsageError, match=r"not a manifest of fmupsample \(line 1\)"):
        Manifest(tmp_path)
    assert (tmp_path / "manifest.jsonl").read_text() == line + "\n"


# -- atomic ---------------------------------------------------------------------------------------


def test_replacing_leaves_the_old_file_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_leftovers_of_killed_runs_are_removed(tmp_path: Path) -> None:
    temporary_for(tmp_path / "a.npy").write_text("half")
    (tmp_path / "mine.part").write_text("keep")
    remove_leftovers([tmp_path])
    assert [p.name for p in tmp_path.iterdir()] == ["mine.part"]


def test_two_runs_exclude_each_other(tmp_path: Path) -> None:
    out = tmp_path / "x" / "out"
    with FolderLock(out):
        code = "import sys; from pathlib import Path; from fmupsample.runs.lock import *\n"
        code += "with FolderLock(Path(sys.argv[1])): pass"
        run = subprocess.run(
            [sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=False
        )
        assert "another run is writing into" in run.stderr
    assert not (tmp_path / "x").exists()  # nothing was written: nothing stays
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file; the output must be a folder"):
        FolderLock(tmp_path / "file").__enter__()


# -- the writer thread ----------------------------------------------------------------------------


class Nothing(Job):
    """A job that is told what to write."""

    def recipe(self, task: Task | None = None) -> Recipe:
        return Recipe.of({})


def store(out: Path) -> Store:
    return Store(out, Nothing(None), Manifest(out))


def output(name: str, channels: int = 2) -> Output:
    shape, name = (channels, 2, 3), PurePosixPath(name)
    task = Task(Source(Path(name.stem), name), name)
    said = {**record(name.stem), "source": task.key, "output": str(name)}
    return Output(task, FORMATS["npy"], shape, torch.float32, {}, said)


def test_writer_thread(tmp_path: Path) -> None:
    """Several files at once; what is wrong with one is said of that one."""
    writer = BackgroundWriter(store(tmp_path))
    (tmp_path / "blocked").write_text("a file where a folder is needed")
    outputs = [output(name) for name in ("a.npy", "blocked/b.npy", "new/c.npy", "d.npy")]
    for made in outputs:
        writer.begin(made)
    for rows in (torch.ones(1, 2, 3), torch.zeros(1, 2, 3)):
        for made in outputs[:3]:
            writer.add(made, rows)
    writer.add(outputs[3], torch.ones(1, 2, 3))
    for made in outputs[:3]:
        writer.end(made, 1.5)
    writer.cancel(outputs[3], "no memory")
    records = writer.close()
    assert [r["status"] for r in records] == ["ok", "failed", "ok", "failed"]
    assert records[0]["bytes"] == (tmp_path / "a.npy").stat().st_size
    assert "cannot be written" in records[1]["error"] and records[1]["output"] is None
    assert records[3]["error"] == "no memory"
    assert np.load(tmp_path / "new/c.npy").mean() == 0.5
    assert not (tmp_path / "d.npy").exists()
    assert not list(tmp_path.rglob("*.part"))


def test_full_disk_ends_the_run_and_keeps_what_is_there(tmp_path: Path, monkeypatch) -> None:
    folder = store(tmp_path)
    writer = BackgroundWriter(folder)
    kind = FORMATS["npy"]
    add = kind._add

    def full(self, rows) -> None:
        if float(rows[0, 0, 0]) == 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(self, rows)

    monkeypatch.setattr(kind, "_add", full)
    for name, value in (("a.npy", 1.0), ("b.npy", 7.0)):
        made = output(name, 1)
        writer.begin(made)
        writer.add(made, torch.full((1, 2, 3), value))
        writer.end(made, 0.0)
    with pytest.raises(OutputError, match=r"the disk is full .* what is finished is kept"):
        while True:
            writer.begin(output("c.npy", 1))
    assert [Path(r["source"]).name for r in writer.abort()] == ["a"]
    folder.manifest.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npy", "manifest.jsonl"]


def test_abort_leaves_no_half_file(tmp_path: Path) -> None:
    writer, made = BackgroundWriter(store(tmp_path)), output("a.npy")
    writer.begin(made)
    writer.add(made, torch.ones(1, 2, 3))
    assert writer.abort() == []
    # It may have been announced already.
    assert [path.name for path in tmp_path.iterdir() if path.name != "manifest.jsonl"] == []


def test_killed_while_writing(tmp_path: Path) -> None:
    """kill -9 in the middle of a file: no file under its name, and the next run tidies up."""
    code = textwrap.dedent("""
        import os, signal, sys, time, torch
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from test_writers import BackgroundWriter, output, store
        out = Path(sys.argv[1])
        writer = BackgroundWriter(store(out))
        for name in ("a", "b"):
            made = output(name)
            writer.begin(made)
            writer.add(made, torch.ones(1, 2, 3))
            if name == "a":
                writer.add(made, torch.ones(1, 2, 3))
                writer.end(made, 0.0)
        while not (out / "a").exists() or not list(out.glob(".fmupsample-*")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)],
        timeout=60, check=False,
    )  # fmt: skip
    assert run.returncode == -9
    assert (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    remove_leftovers([tmp_path])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "manifest.jsonl"]
    [known] = [r for r in Manifest(tmp_path).records.values() if r["output"] == "a"]
    assert known["status"] in ("pending", "ok")
