"""Inputs that are broken, hostile or odd, and what each must lead to.

``docs/broken-input.md`` is made from this list (``python tests/hostile.py > docs/broken-input.md``)
and ``test_hostile.py`` runs every line of it, so that the two say the same.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import PatchMeans, film
from PIL import Image, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fmupsample.draw.pca import PCABasis
from fmupsample.formats.files import SafetensorsFile
from fmupsample.formats.layout import FORMAT as COMPACT
from fmupsample.formats.layout import Layout
from fmupsample.jobs.projection import Projection
from fmupsample.labels.classes import ClassTable
from fmupsample.probing.linear import LinearProbe
from fmupsample.probing.probe import Probe, save_probe
from fmupsample.upsamplers import ReSFU, ReSFUConfig, save_head
from fmupsample.upsamplers.heads import describe_backbone


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        what: for people.
        make: writes what is needed into a folder; what it returns is FILE in the message.
        message: what is printed, the whole of it but for ``error: `` or ``warning: ``; ``...``
            stands for anything. For what is no error: what becomes of it, in brackets.
        code: the exit code beside a sound picture; ``None``: an exception of the library.
        files: results that there must be, besides that of the sound picture.
    """

    what: str
    make: Callable[[Path], Path]
    message: str
    code: int | None = 3
    files: tuple[str, ...] = ()
    fault: Callable[[pytest.MonkeyPatch, Path], object] | None = None  # what the system shall do

    @property
    def fine(self) -> bool:
        return self.message.startswith("(")


# -- pictures -------------------------------------------------------------------------------------


def picture(width: int = 60, height: int = 40, mode: str = "RGB") -> Image.Image:
    """Noise, so that no compression makes it small."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def encoded(kind: str, drawn: Image.Image | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    (drawn or picture()).save(buffer, kind, **options)
    return buffer.getvalue()


def file(name: str, content: bytes | Callable[[], bytes]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content() if callable(content) else content)
        return path

    return make


def half(kind: str, **options: object) -> Callable[[], bytes]:
    def cut() -> bytes:
        whole = encoded(kind, **options)
        return whole[: len(whole) // 2]

    return cut


def png(width: int, height: int, data: bytes) -> bytes:
    """A PNG file whose header says what it likes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        length, checksum = len(body), zlib.crc32(kind + body)
        return struct.pack(">I", length) + kind + body + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _text_bomb() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "\0" * 50_000_000, zip=True)
    return encoded("PNG", pnginfo=info)


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("JPEG", exif=exif)


def _palette_with_alpha() -> bytes:
    drawn = picture(mode="P")
    return encoded("PNG", drawn, transparency=bytes(range(256)))


def _sixteen_bits() -> bytes:
    deep = np.random.default_rng(0).integers(0, 65536, (40, 60)).astype(np.uint16)
    return encoded("PNG", Image.fromarray(deep))


def _floats() -> bytes:
    return encoded("TIFF", Image.fromarray(np.ones((40, 60), dtype=np.float32)))


def _animation() -> bytes:
    return encoded("GIF", picture(mode="P"), save_all=True, append_images=[picture(mode="P")] * 3)


def _folder(folder: Path, name: str = "x.jpg") -> Path:
    (folder / name).mkdir()
    (folder / name / "inside.png").write_bytes(encoded("PNG"))
    return folder / name


def _link(name: str, to: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(to)
        return path

    return make


def _loop(folder: Path) -> Path:
    (folder / "sub").mkdir()
    (folder / "sub/up").symlink_to("..")
    (folder / "sub/me").symlink_to("me")
    return file("sub/in.png", encoded("PNG"))(folder)


def _case(folder: Path) -> Path:
    file("A.png", encoded("PNG"))(folder)
    return file("a.PNG", encoded("PNG"))(folder)


_LONG = "n" * 251 + ".png"

PICTURES = [
    Case("an empty file", file("x.png", b""), "FILE is empty (0 bytes)"),
    Case("a JPEG cut off half way", file("x.jpg", half("JPEG")), "FILE is damaged or cut off: ..."),
    Case("a PNG cut off half way", file("x.png", half("PNG")), "FILE is damaged or cut off: ..."),
    Case("a WebP cut off half way", file("x.webp", half("WEBP")),
         "FILE is damaged or cut off: ..."),
    Case("a GIF cut off half way", file("x.gif", half("GIF", drawn=picture(mode="P"))),
         "FILE is damaged or cut off: ..."),
    Case("a TIFF cut off half way", file("x.tif", half("TIFF")), "FILE is damaged or cut off: ..."),
    Case("text that is called .jpg", file("x.jpg", b"hello\n" * 99),
         "FILE is not a picture in a format that can be read (its content was looked at, not its "
         "extension)"),
    Case("a PNG that is called .jpg", file("x.jpg", encoded("PNG")), "(read)", 0,
         ("x.safetensors",)),
    Case("a PostScript program that is called .png",
         file("x.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"),
         "FILE is not a picture in a format that can be read (its content was looked at, not its "
         "extension)"),
    Case("a PNG of 90 bytes that claims 50,000 x 50,000 pixels",
         file("x.png", png(50_000, 50_000, b"x")),
         "FILE claims more than the 178 million pixels that are decoded safely (a damaged or "
         "hostile file?); if it is genuine, make a smaller copy"),
    Case("a PNG whose comment unpacks to 50 MB", file("x.png", _text_bomb),
         "FILE is damaged or cut off: ..."),
    Case("a picture of no pixels", file("x.png", png(0, 0, zlib.compress(b""))),
         "FILE is not a picture in a format that can be read (its content was looked at, not its "
         "extension)"),
    Case("a picture of 100,000 x 1 pixels",
         file("x.png", lambda: encoded("PNG", picture(100_000, 1))),
         "FILE: a picture of 100000x1 pixels is too long and thin for a short side of 32: give "
         "--image-size HxW or native"),
    Case("an animated GIF", file("x.gif", _animation), "(its first frame)", 0, ("x.safetensors",)),
    Case("16 bits of grey", file("x.png", _sixteen_bits), "(scaled to 8 bits)", 0,
         ("x.safetensors",)),
    Case("CMYK", file("x.jpg", lambda: encoded("JPEG", picture(mode="CMYK"))),
         "(converted; profiles are not applied)", 0, ("x.safetensors",)),
    Case("a palette with transparency", file("x.png", _palette_with_alpha), "(laid on white)", 0,
         ("x.safetensors",)),
    Case("EXIF orientation", file("x.jpg", _turned), "(turned upright)", 0, ("x.safetensors",)),
    Case("floating-point pixels", file("x.tif", _floats),
         "FILE has floating-point pixels, for which black and white are not defined; save it with "
         "8 or 16 bits"),
]  # fmt: skip


# -- videos ---------------------------------------------------------------------------------------


def _video(name: str, count: int = 20) -> Callable[[Path], Path]:
    """A video of noise."""

    def make(folder: Path) -> Path:
        noise = np.random.default_rng(0).integers(0, 256, (count, 48, 64, 3), dtype=np.uint8)
        return film(folder / name, noise)

    return make


def _in_the_third_frame(folder: Path) -> Path:
    path = _video("x.avi")(folder)
    header, _, frames = path.read_bytes().partition(b"movi")
    parts = frames.split(b"00dc")  # each frame begins so
    path.write_bytes(header + b"movi" + b"00dc".join(parts[:3]) + b"00dc" + parts[3][:20])
    return path


def _without_its_index(folder: Path) -> Path:
    path = _video("x.mp4")(folder)
    path.write_bytes(path.read_bytes().partition(b"moov")[0])
    return path


def _no_frame_whole(folder: Path) -> Path:
    path = _video("x.avi")(folder)
    path.write_bytes(path.read_bytes().partition(b"movi")[0] + b"movi00dc" + bytes(200))
    return path


_NO_VIDEO = (
    "FILE is not a video in a format that can be read (its content was looked at, not its "
    "extension)"
)
_TWO = tuple(f"x/frame_00000{n}.safetensors" for n in range(2))

VIDEOS = [
    Case("an empty file", file("x.mp4", b""), "FILE is empty (0 bytes)"),
    Case("text that is called .mp4", file("x.mp4", b"hello\n" * 99), _NO_VIDEO),
    Case("a picture that is called .mov", file("x.mov", encoded("PNG")), _NO_VIDEO),
    Case("a playlist that names other files", file("x.mp4", b"#EXTM3U\n#EXTINF:1,\n/etc/x\n"),
         _NO_VIDEO),
    Case("an AVI cut off in its third frame, of 20", _in_the_third_frame,
         "FILE breaks off after 0:00:00.2 of 0:00:02 (damaged or cut off); the 2 frames before can "
         "be used", 3, _TWO),
    Case("an MP4 cut off before its index, which is at its end", _without_its_index,
         "FILE is damaged or cut off: no video can be found in it"),
    Case("an AVI cut off before the end of its first frame", _no_frame_whole,
         "FILE is damaged or cut off: none of its frames can be read"),
    Case("an AVI without frames", _video("x.avi", 0), "FILE is a video without frames"),
    Case("an AVI that is called .mp4", lambda folder: _video("x.avi", 1)(folder).rename(
         folder / "x.mp4"), "(read)", 0, _TWO[:1]),
    Case("a folder called x.mp4", lambda folder: _folder(folder, "x.mp4"), "(searched)", 0,
         ("x.mp4/inside.safetensors",)),
    Case("a link to nothing", _link("x.mp4", "nothing.mp4"), "FILE does not exist"),
]  # fmt: skip

NAMES = [
    Case("a folder called x.jpg", _folder, "(searched)", 0, ("x.jpg/inside.safetensors",)),
    Case("a link to nothing", _link("x.png", "nothing.png"), "FILE does not exist"),
    Case("a link to itself", _link("x.png", "x.png"),
         "FILE cannot be read: Too many levels of symbolic links"),
    Case("links that lead round in a circle", _loop, "(each folder once)", 0,
         ("sub/in.safetensors",)),
    Case("a name in Unicode", file("ünï ☃ 漢字.png", encoded("PNG")), "(kept)", 0,
         ("ünï ☃ 漢字.safetensors",)),
    Case("a name of 255 bytes", file(_LONG, encoded("PNG")), "(shortened, with a digest)", 0),
    Case("a name with a line break and escape codes, of a bad file",
         file("x\n\x1b[31m.png", b""), "...x\\n\\x1b[31m.png is empty (0 bytes)"),
    Case("names that differ only in case", _case, "(both, under names of their own)", 0,
         ("in/A.png.safetensors", "in/a.PNG~2.safetensors")),
]  # fmt: skip


def _unreadable(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Nobody may open ``path``, not even root."""
    real = Image.open, os.scandir

    def refuse(function: Callable) -> Callable:
        def opened(name: object, *more: object, **options: object) -> object:
            if Path(str(name)).absolute() == path:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return function(name, *more, **options)

        return opened

    monkeypatch.setattr(Image, "open", refuse(real[0]))
    monkeypatch.setattr(os, "scandir", refuse(real[1]))


NAMES += [
    Case("a file that may not be read", file("x.png", encoded("PNG")),
         "FILE cannot be read: Permission denied", fault=_unreadable),
    Case("a folder that may not be read", _folder,
         "folder FILE cannot be read: Permission denied; left out", fault=_unreadable),
]  # fmt: skip


# -- files of numbers -----------------------------------------------------------------------------


def _greedy_backbone(folder: Path) -> Path:
    """A backbone file whose header names a file that timm would unpickle."""
    said = {"format": "fmupsample-backbone/1", "architecture": "test_vit", "tag": "x.v1",
            "model_args": '{"checkpoint_path": "x.pth"}', "mean": "[0, 0, 0]", "std": "[1, 1, 1]",
            "image_size": "64", "card": "{}"}  # fmt: skip
    path = folder / "x.safetensors"
    save_file({"weight": torch.zeros(1)}, path, metadata=said)
    return path


class _Code:
    """Unpickled, it makes a file called ``ran`` in the working folder."""

    def __reduce__(self) -> tuple:
        return open, ("ran", "w")


def write_head(path: Path) -> Path:
    """A sound head for :class:`drawn.PatchMeans`."""
    config = ReSFUConfig(6, guidance_channels=4, embedding=8, middle=8, groups=1, norm_groups=1)
    save_head(path, ReSFU(config), PatchMeans(), {})
    return path


def write_probe(path: Path) -> Path:
    """A sound probe on :class:`drawn.PatchMeans` and nearest-neighbour upsampling."""
    linear = LinearProbe(torch.ones(2, 6), torch.zeros(2))
    pictures = {"image_size": "32", "fit": "resize", "precision": "fp32"}
    upsampler = {"name": "nearest", "fingerprint": "nearest"}
    classes = ClassTable(("a", "b"), (0, 1), ((0, 0, 0), (9, 9, 9)))
    save_probe(path, Probe(linear, describe_backbone(PatchMeans()), upsampler, pictures, classes))
    return path


def write_compact(path: Path) -> Path:
    """A sound compact file."""
    layout = Layout("fine", 3, (16, 24), (16, 24), (16, 24))
    tensors = {"values": torch.zeros(2, 2, 3).half(), "weights": torch.ones(9, 16, 24).half()}
    save_file(tensors, path, {"format": COMPACT, "layout": layout.to_json()})
    return path


def write_map(path: Path) -> Path:
    """A sound whole map."""
    np.save(path, np.zeros((2, 4, 4), dtype=np.float16))
    return path


def write_basis(path: Path) -> Path:
    """A sound basis of ``extract --pca``."""
    Projection(torch.zeros(6), torch.eye(2, 6), torch.ones(2), 3.0).save(path, {})
    return path


def write_in(write: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """What ``write`` makes, as it is."""
    return lambda folder: write(folder / "x.safetensors")


def _saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def cut(write: Callable[[Path], Path], name: str = "x.safetensors") -> Callable[[Path], Path]:
    """What ``write`` makes, without its last bytes."""

    def make(folder: Path) -> Path:
        path = write(folder / name)
        path.write_bytes(path.read_bytes()[:-9])
        return path

    return make


def changed(
    write: Callable[[Path], Path],
    change: Callable[[dict[str, torch.Tensor], dict[str, str]], object],
) -> Callable[[Path], Path]:
    """What ``write`` makes, after ``change(tensors, metadata)``."""

    def make(folder: Path) -> Path:
        path = write(folder / "x.safetensors")
        with safe_open(path, framework="pt") as opened:
            meta = dict(opened.metadata() or {})
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors, meta)
        save_file(tensors, path, meta)
        return path

    return make


def _nan(name: str) -> Callable[[dict, dict], object]:
    return lambda tensors, meta: tensors[name].view(-1)[:1].fill_(float("nan"))


def _narrow(name: str) -> Callable[[dict, dict], object]:
    return lambda tensors, meta: tensors.update({name: tensors[name][:1].clone()})


def _option(key: str, value: object) -> Callable[[dict, dict], object]:
    def change(tensors: dict, meta: dict) -> None:
        meta["config"] = json.dumps({**json.loads(meta["config"]), key: value})

    return change


def _header(key: str, value: str) -> Callable[[dict, dict], object]:
    return lambda tensors, meta: meta.update({key: value})


_PICKLE = file("x.safetensors", pickle.dumps(_Code()))
_NOT_SAFETENSORS = (
    "FILE is not a readable safetensors file (...); heads are .safetensors files written by "
    "fmupsample"
)
_NO_PROBE = (
    "FILE is not a readable safetensors file (...); probes are .safetensors files written by "
    "`fmupsample probe fit`"
)

HEADS = [
    Case("an empty file", file("x.safetensors", b""), _NOT_SAFETENSORS, 1),
    Case("cut off", cut(write_head), _NOT_SAFETENSORS, 1),
    Case("a pickle in disguise", _PICKLE, _NOT_SAFETENSORS, 1),
    Case("another safetensors file", write_in(write_compact),
         "FILE is a file of features, not a head: fmupsample.open reads it", 1),
    Case("a parameter of the wrong shape", changed(write_head, _narrow("key.weight")),
         "the head file FILE is damaged: ... has shape ..., its configuration asks for ...", 1),
    Case("a parameter missing", changed(write_head, lambda t, m: t.pop("key.weight")),
         "the head file FILE does not hold the parameters its configuration asks for: missing "
         "[...], unexpected none", 1),
    Case("NaN", changed(write_head, _nan("key.weight")),
         "the head file FILE is damaged: ... holds NaN or infinity", 1),
    Case("a configuration that asks for terabytes",
         changed(write_head, _option("guidance_channels", 10**5)),
         "the head file FILE is damaged: ... has shape ..., its configuration asks for ...", 1),
    Case("a configuration that cannot be", changed(write_head, _option("groups", 0)),
         "the configuration in the head file FILE is unusable: ...", 1),
    Case("a radius of -5, or of 1.5, in its configuration",
         changed(write_head, _option("guided_radius", 1.5)),
         "the configuration in the head file FILE is unusable: ReSFUConfig: guided_radius is of "
         "type int, not '1.5'", 1),
    Case("a header nested 100,000 deep", changed(write_head, _header("card", "[" * 100_000)),
         "the header of the head file FILE is damaged: ...", 1),
]  # fmt: skip

PROBES = [
    Case("an empty file", file("x.safetensors", b""), _NO_PROBE, 1),
    Case("cut off", cut(write_probe), _NO_PROBE, 1),
    Case("a pickle in disguise", _PICKLE, _NO_PROBE, 1),
    Case("a head", write_in(write_head),
         "FILE is not a probe file of this version: its format is 'fmupsample-head/1', expected "
         "'fmupsample-probe/1'", 1),
    Case("tensors of the wrong shape", changed(write_probe, _narrow("bias")), _NO_PROBE, 1),
    Case("NaN", changed(write_probe, _nan("weight")),
         "the header of the probe file FILE is damaged: ...", 1),
    Case("a header nested 100,000 deep", changed(write_probe, _header("classes", "[" * 100_000)),
         "the header of the probe file FILE is damaged: ...", 1),
]  # fmt: skip

WEIGHTS = [
    Case("an empty file", file("x.safetensors", b""),
         "FILE is not a whole safetensors file (...); download or copy it again", 1),
    Case("a pickle in disguise", _PICKLE,
         "FILE is not a whole safetensors file (...); download or copy it again", 1),
    Case("a pickle that runs code", file("x.pth", pickle.dumps(_Code())),
         "FILE holds more than tensors and would run code when loaded, so it is refused; save its "
         "state_dict() alone, best as safetensors, and give that", 1),
    Case("another model's weights", write_in(write_probe),
         "FILE does not fit test_vit: missing: ...; name the architecture it was trained with "
         "(--backbone)", 1),
    Case("a header that asks for another file, an address or a model of another size",
         _greedy_backbone,
         "FILE: the header cannot be understood (model_args may not hold 'checkpoint_path')", 1),
]  # fmt: skip


def _npy_of_brackets() -> bytes:
    return b"\x93NUMPY\x01\x00\x05\x00((((\n"


def _endless(folder: Path) -> Path:
    header = b'{"features": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 0]}}'
    return file("x.safetensors", struct.pack("<Q", len(header)) + header)(folder)


FEATURES = [
    Case("an empty file", file("x.safetensors", b""),
         "FILE is not a readable safetensors file (damaged or cut off?): ...", None),
    Case("cut off", cut(write_compact),
         "FILE is not a readable safetensors file (damaged or cut off?): ...", None),
    Case("an npy file cut off", cut(write_map, "x.npy"), "FILE is not a readable feature file: ...",
         None),
    Case("an npy file of Python objects",
         file("x.npy", lambda: _saved(np.array([_Code()], dtype=object))),
         "FILE is not a readable feature file: ...", None),
    Case("a pickle in disguise", _PICKLE,
         "FILE is not a readable safetensors file (damaged or cut off?): ...", None),
    Case("weights of the wrong shape", changed(write_compact, _narrow("weights")),
         "the compact file FILE is damaged: weights ... in place of ...", None),
    Case("a layout of 10^12 pixels",
         changed(write_compact, _header("layout", json.dumps(
             {"neighbours": "fine", "kernel_size": 3, "full": [1, 10**12], "crop": [1, 1],
              "size": [1, 1]}))),
         "the compact file FILE is damaged: its layout is not readable (...)", None),
    Case("a layout of infinite size",
         changed(write_compact, _header("layout", json.dumps(
             {"neighbours": "fine", "kernel_size": 3, "full": [1, 1e999], "crop": [1, 1],
              "size": [1, 1]}))),
         "the compact file FILE is damaged: its layout is not readable (...)", None),
    Case("an npy file whose header is `((((`", file("x.npy", _npy_of_brackets),
         "FILE is not a readable feature file: ...", None),
    Case("a later version", changed(write_compact, _header("format", "fmupsample-compact/9")),
         "FILE has the format 'fmupsample-compact/9'; this version reads 'fmupsample-compact/1'",
         None),
]  # fmt: skip


def write_colours(path: Path) -> Path:
    """A sound basis of ``visualize``, for :class:`drawn.PatchMeans`."""
    made_for = {"backbone": PatchMeans.name, "layer": str(PatchMeans.layer)}
    three = torch.ones(3)
    PCABasis(torch.zeros(6), torch.eye(3, 6), -three, 0 * three, three, three / 3, made_for).save(
        path
    )
    return path


def shard(inside: Callable[[Path], Path], suffix: str = ".safetensors") -> Callable[[Path], Path]:
    """What writes the file that ``inside`` writes into a tar file."""

    def write(path: Path) -> Path:
        part = inside(path.with_name(f"part{suffix}"))
        with tarfile.open(path, "w") as tar:
            tar.add(part, f"sub/a{suffix}")
        return path

    return write


def _half_a_shard(folder: Path) -> Path:
    path = shard(write_compact)(folder / "x.tar")
    path.write_bytes(path.read_bytes()[:1200])
    return path


def _shard_of(content: Callable[[Path], Path]) -> Callable[[Path], Path]:
    return lambda folder: shard(lambda path: content(path.parent).rename(path))(folder / "x.tar")


SHARDS = [
    Case("no tar file", file("x.tar", b"no tar" * 200),
         "FILE is not a readable shard (damaged or cut off?): ...", None),
    Case("cut off", _half_a_shard, "FILE is not a readable shard (damaged or cut off?): ...", None),
    Case("a sample cut off", _shard_of(cut(write_compact)), "FILE, sample sub/a is damaged: ...",
         None),
    Case("a sample of infinite size", _shard_of(_endless), "FILE, sample sub/a is damaged: ...",
         None),
    Case("a sample that is a pickle in disguise", _shard_of(_PICKLE),
         "FILE, sample sub/a is damaged: ...", None),
]  # fmt: skip

BASES = [
    Case("an empty file", file("x.safetensors", b""), "FILE is not a PCA basis: ...", 2),
    Case("a pickle in disguise", _PICKLE, "FILE is not a PCA basis: ...", 2),
    Case("another safetensors file", write_in(write_basis),
         "FILE is not a PCA basis: expected the basis.safetensors that 'fmupsample visualize' "
         "leaves beside its pictures", 2),
    Case("tensors of the wrong shape", changed(write_colours, _narrow("low")),
         "FILE is a damaged PCA basis: its tensors do not fit together", 2),
    Case("NaN", changed(write_colours, _nan("mean")),
         "FILE is a damaged PCA basis: it holds NaN or infinity", 2),
]  # fmt: skip


# -- the output folder ----------------------------------------------------------------------------


def _read_only(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    real = os.open

    def opened(path: object, flags: int, *more: object, **options: object) -> int:
        if flags & os.O_CREAT and Path(str(path)).parent == out:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", opened)


def _fills_up(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    real, files = SafetensorsFile._add, []

    def add(self: SafetensorsFile, rows: torch.Tensor) -> None:
        if self not in files:
            files.append(self)
        if len(files) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, rows)

    monkeypatch.setattr(SafetensorsFile, "_add", add)


def _manifest(*lines: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        file("out/manifest.jsonl", text.encode())(folder)
        return folder / "out"

    return make


def _leaves(folder: Path) -> Path:
    """The manifest of a stranger, in which our picture's old result is a file outside."""
    (folder / "precious").write_text("precious")
    source = str(folder / "in" / "good.png")
    return _manifest({"source": source, "status": "ok", "output": "../precious"})(folder)


def _in_out(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
    def inside(folder: Path) -> Path:
        (folder / "out").mkdir()
        make(folder / "out").rename(folder / "out/pca.safetensors")
        return folder / "out"

    return inside


_NOT_OURS = (
    "FILE/manifest.jsonl is not a manifest of fmupsample (line 1): choose another output folder, "
    "or move that file away"
)
_NO_BASIS = (
    "FILE/pca.safetensors is not the PCA basis of an earlier run: move it away, or choose another "
    "output folder"
)

OUTPUTS = [
    Case("a file of that name", file("out", b""),
         "FILE is a file; the output must be a folder", 1),
    Case("on a read-only disk", lambda folder: folder / "out",
         "cannot write into the output folder FILE: Read-only file system", 1, fault=_read_only),
    Case("on a disk that fills up", lambda folder: folder / "out",
         "the disk is full (No space left on device); what is finished is kept: free some space, "
         "or use --dtype fp16, --pca 32 or a smaller --output-size, and run the command again", 1,
         fault=_fills_up),
    Case("a manifest.jsonl of another program", _manifest({"image": "a.jpg"}), _NOT_OURS, 2),
    Case("a manifest that names results outside the folder", _leaves, _NOT_OURS, 2),
    Case("with `--pca 2`: a basis cut off", _in_out(cut(write_basis)), _NO_BASIS, 2),
    Case("with `--pca 2`: a basis of NaN", _in_out(changed(write_basis, _nan("mean"))),
         _NO_BASIS, 2),
    Case("with `--pca 2`: a pickle in disguise", _in_out(_PICKLE), _NO_BASIS, 2),
]  # fmt: skip

GROUPS = {
    "Pictures": ("`fmupsample extract`, beside a sound picture, which is done in every case.",
                 PICTURES),
    "Videos": ("The same. `visualize` says the same, and draws what can be used.", VIDEOS),
    "Names, links and folders": ("The same.", NAMES),
    "`--head FILE`": ("Nothing is started.", HEADS),
    "`fmupsample probe predict FILE`": ("Nothing is started.", PROBES),
    "`--backbone-weights FILE`": ("Nothing is started; no code in a file is ever run.", WEIGHTS),
    "`fmupsample.open(FILE)`": ("A `FeaturesError`.", FEATURES),
    "`fmupsample.open_shards(FILE)`": ("A `FeaturesError`, at once or for the sample.", SHARDS),
    "`fmupsample visualize --basis FILE`": ("Nothing is drawn.", BASES),
    "`--output FILE`": ("What is in the folder stays.", OUTPUTS),
}  # fmt: skip

_OPENING = """\
# Broken, hostile and odd input

What the commands say, and how they end. FILE stands for the path, ... for a detail. Warnings and
errors go to standard error, one line each; exit codes are those of [cli.md](cli.md#exit-codes).
`tests/hostile.py` holds this list and makes this page; `tests/test_hostile.py` runs every line of
it, and random damage to every kind of file.
"""


def page() -> str:
    """``docs/broken-input.md``."""
    parts = [_OPENING]
    for title, (note, cases) in GROUPS.items():
        with_code = cases[0].code is not None
        parts.append(f"\n## {title}\n\n{note}\n\n")
        parts.append(f"| what | message |{' exit code |' if with_code else ''}\n")
        parts.append(f"|---|---|{'---|' if with_code else ''}\n")
        for case in cases:
            message = case.message[1:-1] if case.fine else f"`{case.message.replace('`', '')}`"
            code = f" {case.code} |" if with_code else ""
            parts.append(f"| {case.what} | {message} |{code}\n")
    return "".join(parts)


if __name__ == "__main__":
    print(page(), end="")
