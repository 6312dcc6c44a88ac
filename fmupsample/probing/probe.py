"""A fitted probe and its file: safetensors whose header says what it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fmupsample.atomic import replacing
from fmupsample.backbones import Backbone
from fmupsample.backbones.views import VIEWS
from fmupsample.errors import FmupsampleError, OutputError, ProbeError
from fmupsample.images.find import printable
from fmupsample.labels.classes import ClassTable
from fmupsample.pipeline import Item, Pipeline
from fmupsample.probing.linear import LinearProbe
from fmupsample.probing.tasks import Depth, classes_at
from fmupsample.upsamplers.heads import describe_backbone, is_other_version
from fmupsample.upsamplers.registry import names_in_files

FORMAT = "fmupsample-probe/1"
TASKS = ("segmentation", "depth")
_KEYS = ("backbone", "upsampler", "pictures", "classes", "depth", "card")
_LOCAL = ".local-"
_MOST_CHANNELS = 1 << 20


@dataclass(frozen=True)
class Probe:
    """A linear probe, and everything it needs to be used again.

    Attributes:
        backbone: name, layer, channels, fingerprint, ... as a head file records them.
        upsampler: ``name`` and ``fingerprint`` (of its parameters, for a learned one).
        pictures: ``image_size``, ``fit`` and ``precision`` with which it was fitted.
        classes: of segmentation; ``None`` for depth.
        depth: for depth ``low`` and ``high`` (metres), ``scale`` (units a metre in 16-bit files)
            and ``near`` (about the nearest in the training pictures; colours begin there).
        card: how it was made and how good it is, for people.
    """

    linear: LinearProbe
    backbone: dict[str, Any]
    upsampler: dict[str, Any]
    pictures: dict[str, Any]
    classes: ClassTable | None = None
    depth: dict[str, float] | None = None
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """``"segmentation"`` or ``"depth"``."""
        return "depth" if self.classes is None else "segmentation"

    def depth_task(self) -> Depth:
        """How its outputs become metres."""
        assert self.depth is not None
        return Depth(self.depth["low"], self.depth["high"], len(self.linear.bias))

    @property
    def loadable_backbone(self) -> str:
        """The name by which ``load_backbone`` knows the backbone it was fitted on."""
        name = str(self.backbone["name"]).partition(_LOCAL)[0]
        return "embedded" if name.startswith("embedded.") else name

    @property
    def views(self) -> int:
        """In how many views the backbone saw each picture."""
        return int(self.backbone.get("views", 1))

    @property
    def needs_weights(self) -> bool:
        """Whether the backbone's weights came from a file that must be named again."""
        return _LOCAL in str(self.backbone["name"])

    def check(self, pipeline: Pipeline) -> None:
        """Raise a ProbeError in one sentence if it was fitted on other features than these."""
        in_use = describe_backbone(pipeline.backbone)
        for key in ("fingerprint", "layer", "channels"):
            if str(self.backbone.get(key)) != str(in_use[key]):
                raise ProbeError(
                    f"this probe was fitted on backbone {self.backbone['name']} (layer "
                    f"{self.backbone['layer']}, {self.backbone['fingerprint']}), not on "
                    f"{in_use['name']} (layer {in_use['layer']}, {in_use['fingerprint']}): "
                    + (
                        "that version is no longer shipped, so fit the probe again"
                        if is_other_version(str(self.backbone["name"]), in_use["name"])
                        else "fit one for it, or leave --backbone and --layer away"
                    )
                )
        views = in_use.get("views", 1)
        if views != self.views:
            raise ProbeError(
                f"this probe was fitted with --views {self.views}, not {views}: fit one for it, or "
                "leave --views away"
            )
        method = pipeline.upsampler
        assert method is not None
        print_ = method.fingerprint
        known = self.upsampler["name"] in names_in_files(method.name)
        if not known or print_ != self.upsampler["fingerprint"]:
            raise ProbeError(
                f"this probe was fitted on upsampler {self.upsampler['name']} "
                f"({self.upsampler['fingerprint']}), not on {method.name} ({print_}): give the "
                "--head it was fitted with, or fit another probe"
            )

    # -- using it -----------------------------------------------------------------------------

    def logits(self, pipeline: Pipeline, item: Item) -> Tensor:
        """Outputs of a picture at the size the backbone saw, ``[outputs, H, W]``, without padding.

        Classified at low resolution, then reassembled: no map of all channels is made.
        """
        return pipeline.upsample(item, value=self.linear.logits(item.features))

    def decide(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Class numbers (int64) or metres (float32) ``[H, W]`` at ``size``."""
        if self.classes is None:
            return self.depth_task().decide(logits, size)
        return classes_at(logits, size)


def make_probe(
    linear: LinearProbe,
    pipeline: Pipeline,
    *,
    classes: ClassTable | None = None,
    depth: Mapping[str, float] | None = None,
    card: Mapping[str, Any] | None = None,
) -> Probe:
    """A probe fitted on the features of ``pipeline``."""
    method, backbone = pipeline.upsampler, pipeline.backbone
    assert method is not None
    return Probe(
        linear,
        describe_backbone(backbone),
        {"name": method.name, "fingerprint": method.fingerprint},
        {
            "image_size": str(pipeline.image_size or _default_size(backbone)),
            "fit": pipeline.fit,
            "precision": pipeline.precision,
        },
        classes,
        None if depth is None else dict(depth),
        dict(card or {}),
    )


def _default_size(backbone: Backbone) -> str:
    if backbone.fixed_size is not None:
        return f"{backbone.fixed_size[0]}x{backbone.fixed_size[1]}"
    return str(backbone.default_image_size)


def save_probe(path: str | Path, probe: Probe) -> None:
    """Write a probe file; it appears under its name only when complete.

    Raises:
        OutputError: it cannot be written.
    """
    path = Path(path)
    facts = {
        "backbone": probe.backbone,
        "upsampler": probe.upsampler,
        "pictures": probe.pictures,
        "classes": None if probe.classes is None else probe.classes.to_json(),
        "depth": probe.depth,
        "card": probe.card,
    }
    metadata = {"format": FORMAT} | {k: json.dumps(v) for k, v in facts.items()}
    tensors = {"weight": probe.linear.weight, "bias": probe.linear.bias}
    tensors = {k: t.detach().float().cpu().contiguous() for k, t in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(save(tensors, metadata))
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"the probe {printable(path)} cannot be written: {reason}") from error


def load_probe(path: str | Path) -> Probe:
    """Read a probe file.

    Raises:
        ProbeError: missing, cut off, no probe, or with contents that cannot be.
    """
    path = Path(path)
    shown = printable(path)
    if not path.is_file():
        raise ProbeError(f"there is no probe file {shown}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            shapes = {k: file.get_slice(k).get_shape() for k in file.keys()}  # noqa: SIM118
            if metadata.get("format") != FORMAT:
                raise ProbeError(
                    f"{shown} is not a probe file of this version: its format is "
                    f"{metadata.get('format', 'not stated')!r}, expected {FORMAT!r}"
                )
            _check_shapes(shapes)
            linear = LinearProbe(file.get_tensor("weight"), file.get_tensor("bias"))
    except ProbeError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise ProbeError(
            f"{shown} is not a readable safetensors file ({error}); probes are .safetensors files "
            "written by `fmupsample probe fit`"
        ) from error
    try:
        facts = {k: json.loads(metadata[k]) for k in _KEYS}
        probe = _from_facts(linear, facts)
    except (
        KeyError, ValueError, TypeError, AttributeError, RecursionError, OverflowError,
    ) as error:  # fmt: skip
        raise ProbeError(f"the header of the probe file {shown} is damaged: {error!r}") from error
    except FmupsampleError as error:
        raise ProbeError(f"the header of the probe file {shown} is damaged: {error}") from error
    return probe


def _check_shapes(shapes: Mapping[str, list[int]]) -> None:
    if sorted(shapes) != ["bias", "weight"]:
        raise ValueError(f"it holds {sorted(shapes)[:4]} instead of bias and weight")
    weight, bias = shapes["weight"], shapes["bias"]
    if len(weight) != 2 or bias != weight[:1] or not 1 <= weight[1] <= _MOST_CHANNELS:
        raise ValueError(f"weight {weight} and bias {bias} do not fit together")


def _from_facts(linear: LinearProbe, facts: Mapping[str, Any]) -> Probe:
    outputs, channels = linear.weight.shape
    for name, tensor in (("weight", linear.weight), ("bias", linear.bias)):
        if tensor.dtype != torch.float32 or not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds numbers other than finite float32")
    backbone, upsampler = dict(facts["backbone"]), dict(facts["upsampler"])
    for key in ("name", "layer", "channels", "fingerprint"):
        backbone[key]  # raises where it is missing
    for key in ("name", "fingerprint"):
        upsampler[key]
    if backbone.get("views", 1) not in VIEWS:
        raise ValueError(f"{backbone['views']} views")
    if backbone["channels"] != channels:
        raise ValueError(f"{channels} channels, but the backbone has {backbone['channels']}")
    if (facts["classes"] is None) == (facts["depth"] is None):
        raise ValueError("neither classes nor depth, or both")
    classes, depth = None, None
    if facts["classes"] is not None:
        classes = ClassTable.from_json(facts["classes"])
        if len(classes) != outputs:
            raise ValueError(f"{outputs} outputs for {len(classes)} classes")
    else:
        depth = {k: float(facts["depth"][k]) for k in ("low", "high", "scale", "near")}
        Depth(depth["low"], depth["high"], outputs)
        if not depth["low"] <= depth["near"] <= depth["high"]:
            raise ValueError(f"the nearest depth {depth['near']:g} is out of range")
    pictures = dict(facts["pictures"])
    for key in ("image_size", "fit", "precision"):
        if not isinstance(pictures[key], str):
            raise TypeError(f"{key} is not text")
    return Probe(linear, backbone, upsampler, pictures, classes, depth, dict(facts["card"]))
