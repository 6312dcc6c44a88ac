"""Every line of ``docs/broken-input.md``, and random damage to every kind of file."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import hostile
import numpy as np
import pytest
from drawn import PatchMeans, draw, film
from hostile import Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import fmupsample
from fmupsample import backbones
from fmupsample.draw.pca import PCABasis
from fmupsample.errors import FeaturesError, FmupsampleError
from fmupsample.images import Source, read_picture, read_size
from fmupsample.jobs.projection import Projection
from fmupsample.probing.probe import load_probe
from fmupsample.runs.manifest import Manifest
from fmupsample.upsamplers import load_upsampler
from fmupsample.video import FrameReader, Span, films_of, scan
from fmupsample_cli.main import main

GOOD = "good.safetensors"


@pytest.fixture(autouse=True)
def small_backbone(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backbones, "load_backbone", lambda *a, **k: PatchMeans())
    monkeypatch.chdir(tmp_path)  # code that runs would leave a file here
    draw(tmp_path / "in/good.png")


def cases(*groups: list[Case]) -> pytest.MarkDecorator:
    listed = [case for group in groups for case in group]
    return pytest.mark.parametrize("case", listed, ids=[case.what[:40] for case in listed])


def check(said: str, case: Case, path: Path) -> None:
    """``said`` is the message of the case and nothing else, on one line."""
    shown = "[^\n]*".join(re.escape(part) for part in case.message.split("..."))
    shown = shown.replace("FILE", re.escape(str(path)))
    assert re.fullmatch(rf"(?:error: |warning: )?{shown}\n?", said), said
    assert not Path("ran").exists()


def call(*arguments: object) -> int:
    with contextlib.redirect_stdout(io.StringIO()):
        return main([str(a) for a in (*arguments, "--device", "cpu", "-q")])


def test_the_page_is_made_from_the_list() -> None:
    text = (Path(__file__).parents[1] / "docs/broken-input.md").read_text("utf-8")
    assert text == hostile.page(), "python tests/hostile.py > docs/broken-input.md"


@cases(hostile.PICTURES, hostile.VIDEOS, hostile.NAMES)
def test_pictures(case: Case, tmp_path: Path, monkeypatch, capsys) -> None:
    path = case.make(tmp_path / "in")
    if case.fault is not None:
        case.fault(monkeypatch, path)
    folder = tmp_path / "in"
    assert call("extract", folder, "-o", "out", "--upsampler", "nearest") == case.code
    said = capsys.readouterr().err
    if case.fine:
        assert said == ""
    else:
        check(said, case, path)
    assert load_file(f"out/{GOOD}")["features"].shape == (6, 32, 48)
    made = {str(p.relative_to("out")) for p in Path("out").rglob("*.safetensors")} - {GOOD}
    assert len(made) == 1 if case.fine and not case.files else made == set(case.files)


@cases(hostile.HEADS)
def test_heads(case: Case, tmp_path: Path, capsys) -> None:
    path = case.make(tmp_path)
    assert call("extract", "in", "-o", "out", "--head", path) == case.code
    check(capsys.readouterr().err, case, path)
    assert not Path("out").exists()


@cases(hostile.PROBES)
def test_probes(case: Case, tmp_path: Path, capsys) -> None:
    path = case.make(tmp_path)
    assert call("probe", "predict", path, "in", "-o", "out") == case.code
    check(capsys.readouterr().err, case, path)
    assert not Path("out").exists()


@cases(hostile.WEIGHTS)
def test_backbone_weights(case: Case, tmp_path: Path, capsys, monkeypatch) -> None:
    from fmupsample.backbones.loading import load_backbone

    monkeypatch.setattr(backbones, "load_backbone", load_backbone)
    path = case.make(tmp_path)
    arguments = ("--backbone", "test_vit", "--backbone-weights", path, "--upsampler", "nearest")
    assert call("extract", "in", "-o", "out", *arguments) == case.code
    check(capsys.readouterr().err, case, path)
    assert not Path("out").exists()


@cases(hostile.FEATURES)
def test_feature_files(case: Case, tmp_path: Path) -> None:
    path = case.make(tmp_path)
    with pytest.raises(FeaturesError) as caught:
        fmupsample.open(path)
    check(str(caught.value), case, path)


@cases(hostile.SHARDS)
def test_shards(case: Case, tmp_path: Path) -> None:
    path = case.make(tmp_path)
    with pytest.raises(FeaturesError) as caught:
        _read_shard(path)
    check(str(caught.value), case, path)


@cases(hostile.BASES)
def test_bases_of_colours(case: Case, tmp_path: Path, capsys) -> None:
    path = case.make(tmp_path)
    arguments = ("--basis", path, "--upsampler", "nearest")
    assert call("visualize", "in", "-o", "out", *arguments) == case.code
    check(capsys.readouterr().err, case, path)
    assert not list(Path().glob("out/*"))


@cases(hostile.OUTPUTS)
def test_output_folders(case: Case, tmp_path: Path, monkeypatch, capsys) -> None:
    draw(tmp_path / "in/other.png")
    path = case.make(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    if case.fault is not None:
        case.fault(monkeypatch, path)
    pca = ("--pca", 2) if "--pca" in case.what else ()
    arguments = ("--upsampler", "nearest", *pca)
    assert call("extract", "in", "-o", path, *arguments) == case.code
    check(capsys.readouterr().err, case, path)
    assert before.items() <= {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}.items()
    if case.fault is hostile._fills_up:
        assert {p.name for p in path.iterdir()} == {GOOD, "manifest.jsonl"}
        monkeypatch.undo()
        monkeypatch.setattr(backbones, "load_backbone", lambda *a, **k: PatchMeans())
        assert call("extract", tmp_path / "in", "-o", path, *arguments) == 0


# -- a disk that is really full -------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes, or resizes, a disk of its own in memory."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size: str, *options: str) -> Path:
        what = ",".join((f"size={size}", *options))
        command = ["mount", "-t", "tmpfs", "-o", what, "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no permission to mount a disk")
        return place

    if shutil.which("mount") is None:
        pytest.skip("no mount")
    yield mount
    subprocess.run(["umount", str(place)], capture_output=True, check=False)


def test_a_full_disk(small_disk, tmp_path: Path, monkeypatch, capsys) -> None:
    disk = small_disk("64k")
    for i in range(5):
        draw(tmp_path / f"in/{i}.png")
    command = ("extract", tmp_path / "in", "-o", disk / "out", "--upsampler", "nearest")
    assert call(*command) == 1
    assert "nothing was started" in capsys.readouterr().err and not (disk / "out").exists()
    # Somebody else takes the space while the run goes on.
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 10**9))
        assert call(*command) == 1
    assert "the disk is full (No space left on device)" in capsys.readouterr().err
    kept = {path: path.stat().st_mtime_ns for path in (disk / "out").glob("*.safetensors")}
    assert 1 <= len(kept) < 6
    assert all(load_file(path)["features"].shape == (6, 32, 48) for path in kept)
    assert not list((disk / "out").glob(".*"))
    small_disk("1m", "remount")
    assert call(*command) == 0
    assert len(list((disk / "out").glob("*.safetensors"))) == 6
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())


# -- random damage --------------------------------------------------------------------------------


def _manifest(path: Path) -> Path:
    path.write_text('{"source":"/a.png","status":"ok","output":"a.npy","bytes":3,"beside":[]}\n')
    return path


def _read_shard(path: Path) -> None:
    for features in fmupsample.open_shards(path).values():
        features.at([(3, 4)])


def _read_video(path: Path) -> None:
    clip = scan(Source(path, PurePosixPath(path.name)), Span(every=2))
    assert bool(clip.frames) != bool(clip.error) and clip.rate > 0
    reader = FrameReader()
    for source in reader.watch(films_of([clip])[0].frames):
        reader.read(source)


KINDS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object]]] = {
    "head": (hostile.write_head, lambda path: load_upsampler(PatchMeans(), path)),
    "probe": (hostile.write_probe, load_probe),
    "basis": (hostile.write_basis, Projection.load),
    "basis of colours": (hostile.write_colours, PCABasis.load),
    "compact": (hostile.write_compact, lambda path: fmupsample.open(path).at([(3, 4)])),
    "npy": (hostile.write_map, lambda path: fmupsample.open(path).full()),
    "shard": (hostile.shard(hostile.write_compact, ".safetensors"), _read_shard),
    "shard of npy": (hostile.shard(hostile.write_map, ".npy"), _read_shard),
    "manifest": (_manifest, lambda path: Manifest(path.parent)),
    **{
        kind: (
            lambda path, kind=kind: hostile.file(path.name, hostile.encoded(kind))(path.parent),
            lambda path: (read_size(path), read_picture(path, lambda size: (8, 8))),
        )
        for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM")
    },
    **{kind: (lambda path: film(path, 6), _read_video) for kind in ("avi", "mp4", "mkv")},
}
_NAMES = {"npy": "x.npy", "manifest": "manifest.jsonl", "avi": "x.avi"}
_NAMES |= {"mp4": "x.mp4", "mkv": "x.mkv"}
# Where it is (of the whole file, the beginning more often), and what comes there.
DAMAGE = st.lists(
    st.tuples(
        st.floats(0, 1).map(lambda x: x**3),
        st.one_of(
            st.binary(min_size=1, max_size=4),
            st.sampled_from([b"\xff" * 8, b"\0" * 8, b"[" * 40, b"9" * 12, b"-1", b"NaN", b"null"]),
        ),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=DAMAGE, kept=st.sampled_from([1.0, 1.0, 0.9, 0.5, 0.1]), wider=st.booleans())
def test_damaged_files_load_or_say_why(kind, damage, kept, wider, tmp_path: Path) -> None:
    """Bytes overwritten or pushed in, the end cut off: a sentence, or an object, and nothing
    else."""
    write, read = KINDS[kind]
    path = tmp_path / _NAMES.get(kind, "x.safetensors")
    whole = tmp_path / "whole" / path.name
    if not whole.exists():
        whole.parent.mkdir(exist_ok=True)
        write(whole)
        read(whole)
    content = bytearray(whole.read_bytes())
    for place, new in damage:
        at = min(int(place * len(content)), len(content) - 1)
        content[at : at + (0 if wider else len(new))] = new
    path.write_bytes(content[: int(kept * len(content))])
    with np.errstate(all="ignore"):
        try:
            read(path)
        except FmupsampleError as error:
            assert str(error) and "\n" not in str(error)
