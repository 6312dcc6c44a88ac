"""Every number a training run depends on, in one place; saved with the head."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from fmupsample.device import check_precision
from fmupsample.errors import UsageError
from fmupsample.number_formats import number_format
from fmupsample.upsamplers.registry import current_name

TERMS = ("clusters", "crops", "masks")  # of the objective; objective.py says what they are
ENLARGED = frozenset({"clusters", "crops"})  # terms whose targets come from the enlarged crop

# What a run may change when it goes on from a checkpoint; everything else would make it another.
FREE = frozenset({"lr", "weight_decay", "clip", "validate_every", "log_every", "previews"})

_RENAMED = {"views": "crops_kept"}  # since backbones have views, which are something else
_REMOVED = {
    "cosine", "mse", "scaling", "cluster_balance", "region_share", "variation", "jitter",
    "lr_multipliers",
}  # fmt: skip


def _within(low: float, high: float, default: float | None) -> Any:
    """A field that holds a number from ``low`` to ``high``, or ``None`` if that is its default."""
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run; ``None`` is decided by :meth:`resolve`.

    Whatever is not named here (device, threads, memory for caches, where files go) does not change
    the result beyond rounding.
    """

    # --- what is trained
    upsampler: str = "bilateral-cells"
    upsampler_config: dict[str, Any] = field(default_factory=dict)  # fields of its own config
    late_prior: bool = True  # bilateral cells have the colours of their prior after training only

    # --- for what
    objective: dict[str, float] = field(default_factory=lambda: {"clusters": 1.0})  # weights
    clusters: int = _within(2, 65536, 100)  # more are finer; a few dozen crops can fill a hundred
    cluster_share: float = _within(0, 1, 0.8)  # of the region's mean in what tells the cluster
    region_block: float = _within(0.5, 64, 2.0)  # cells; 3 x 3 neighbours reach no farther
    enlarge: int = _within(1, 8, 2)  # the crop shown larger; 2 is near the sizes backbones know
    pixel_stride: int = _within(1, 64, 2)  # every n-th pixel of either axis: a quarter of the work
    mask_widen: float = _within(1, 8, 1.0)  # cells; a patch tells of what is beside it

    # --- on what
    image_sizes: tuple[int, ...] | None = None  # crops, pixels; several take turns
    side: int | None = _within(32, 8192, None)  # of squares kept; 11/7 of the largest crop
    crop: tuple[float, float] = (0.55, 1.0)  # side of a crop, as a share of the square's
    flip: float = _within(0, 1, 0.5)  # of the crops are mirrored
    crops_kept: int | None = _within(0, 1e6, None)  # of a square; 0: always new ones; see cache.py
    held_out: float = _within(0, 0.9, 0.05)  # of the pictures, if none are given for validation

    # --- how long, how fast
    steps: int | None = _within(1, 1e9, None)  # 2000 on a GPU, else 400: some minutes
    batch_size: int | None = _within(1, 1e5, None)  # per process; 8 on a GPU, else 2
    lr: float = _within(0, 100, 1e-3)  # heads are small and start from nothing: not the usual 2e-4
    weight_decay: float = _within(0, 100, 0.01)  # of matrices; norms and biases have none
    warmup: float = _within(0, 1, 0.05)  # of the steps
    final_lr: float = _within(0, 1, 0.01)  # of the peak, at the end of the cosine
    clip: float = _within(1e-9, 1e9, 1.0)  # of the gradient's norm
    ema: float = _within(0, 1, 0.998)  # the averaged weights are what is validated and saved
    precision: str | None = None  # of the backbone: bf16 on a GPU that has it, else fp32
    seed: int = _within(0, 2**63 - 1, 0)

    # --- how it is watched
    validate_every: int | None = _within(1, 1e9, None)  # steps; ten times a run
    log_every: int = _within(1, 1e9, 10)  # steps
    previews: int = _within(0, 64, 2)  # held-out pictures drawn at every validation

    def __post_init__(self) -> None:
        name = current_name(self.upsampler) if isinstance(self.upsampler, str) else self.upsampler
        if name != self.upsampler:
            # "resfu-universal" was the name of heads for any backbone.
            object.__setattr__(self, "upsampler", name)
            object.__setattr__(self, "upsampler_config", {"channels": 0, **self.upsampler_config})
        for option in fields(self):
            if option.metadata and (value := getattr(self, option.name)) is not None:
                _check_number(option.name, value, str(option.type), **option.metadata)
        self._check_objective()
        low, high = self.crop
        if not 0 < low <= high <= 1:
            raise UsageError(f"crop {list(self.crop)} must be two shares, 0 < smallest <= largest")
        for size in self.image_sizes or ():
            if not 16 <= size <= 4096:
                raise UsageError(f"image size {size} is not possible: give 16 to 4096 pixels")

    def _check_objective(self) -> None:
        unknown = sorted(set(self.objective) - set(TERMS))
        if unknown:
            raise UsageError(
                f"the objective has no term {', '.join(unknown)}; it has {', '.join(TERMS)}"
            )
        weights = self.objective.values()
        if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            raise UsageError(f"the weights of the objective {self.objective} must be 0 or more")

    @property
    def terms(self) -> dict[str, float]:
        """The terms that count, with their weights."""
        return {name: self.objective[name] for name in TERMS if self.objective.get(name)}

    @property
    def regions(self) -> bool:
        """Whether the regions of the pictures are needed."""
        return "clusters" in self.terms and self.cluster_share > 0

    def resolve(self, backbone: Any, device: torch.device) -> TrainConfig:
        """The same with every ``None`` decided for this backbone and device.

        Raises:
            UsageError: a size the backbone does not take, a precision the device does not have.
        """
        fast = device.type == "cuda"
        precision = self.precision
        if precision is None:
            precision = "bf16" if fast and torch.cuda.is_bf16_supported() else "fp32"
        check_precision(precision, device)
        precision = number_format(precision)
        sizes = self._crop_sizes(backbone)
        steps = self.steps or (2000 if fast else 400)
        return replace(
            self,
            image_sizes=sizes,
            side=self.side or round(max(sizes) * 11 / 14) * 2,
            steps=steps,
            batch_size=self.batch_size or (8 if fast else 2),
            precision=precision,
            validate_every=self.validate_every or max(1, steps // 10),
        )

    def _crop_sizes(self, backbone: Any) -> tuple[int, ...]:
        """The sides of crops, in multiples that the backbone takes."""
        sizes = self.image_sizes or (min(224, backbone.default_image_size),)
        fixed = backbone.fixed_size
        if fixed is not None:
            only = f"{fixed[0]}x{fixed[1]}"
            if fixed[0] != fixed[1]:
                raise UsageError(
                    f"{backbone.name} takes pictures of {only} only; training uses squares: load "
                    "it for a square size"
                )
            if self.image_sizes not in (None, (fixed[0],)):
                raise UsageError(
                    f"{backbone.name} takes pictures of {only} only: leave --image-size away"
                )
            sizes = (fixed[0],)
        multiple = backbone.size_multiple[0]
        # At least 4 x 4 cells: below that a crop has more border than inside.
        least = math.ceil(4 * backbone.stride[0] / multiple) * multiple
        found = (max(max(round(size / multiple), 1) * multiple, least) for size in sizes)
        return tuple(dict.fromkeys(found))

    # -- as JSON --------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build from a mapping as JSON gives it; unknown keys are refused by name."""
        known = [f.name for f in fields(cls)]
        values = {_RENAMED.get(name, name): value for name, value in values.items()}
        if gone := [name for name in values if name in _REMOVED]:
            raise UsageError(
                f"training no longer has the options {', '.join(gone)}: leave them out"
            )
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
                raise UsageError(f"training has no option {name!r}; {hint}")
        changed = dict(values)
        for name in ("image_sizes", "crop"):
            if changed.get(name) is not None:
                changed[name] = _numbers(name, changed[name])
        for name in ("objective", "upsampler_config"):
            if name in changed and not isinstance(changed[name], Mapping):
                raise UsageError(f"training option {name}={changed[name]!r} must be a mapping")
        try:
            return cls(**changed)
        except TypeError as error:
            raise UsageError(f"training options are not understood: {error}") from error

    @classmethod
    def parse(cls, text: str) -> dict[str, Any]:
        """The mapping in ``text``: a JSON file's name, or the JSON itself."""
        if text.lstrip().startswith("{"):
            where, content = "--config", text
        else:
            where = text
            try:
                content = Path(text).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"the options in {text} cannot be read: {error}") from error
        try:
            values = json.loads(content)
        except ValueError as error:
            raise UsageError(f"{where} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise UsageError(f'{where} must be a JSON object, such as {{"lr": 0.002}}')
        return values

    def differences(self, other: TrainConfig) -> list[str]:
        """Options in which a run that goes on must not differ from the one that began, in words."""
        mine, theirs = (json.loads(json.dumps(c.to_dict())) for c in (self, other))
        return [
            f"{name} {mine[name]} (the run began with {theirs[name]})"
            for name in mine
            if name not in FREE and mine[name] != theirs[name]
        ]


def parse_objective(text: str) -> dict[str, float]:
    """``"clusters,masks=0.5"`` -> ``{"clusters": 1.0, "masks": 0.5}``.

    Raises:
        UsageError: a term without name, or a weight that is not a number.
    """
    weights: dict[str, float] = {}
    for part in text.replace("+", ",").split(","):
        name, _, weight = part.strip().partition("=")
        try:
            weights[name.strip()] = float(weight or 1)
        except ValueError:
            name = ""
        if not name:
            raise UsageError(
                f"objective {text!r} is not understood: give terms and weights such as "
                f"clusters,masks=0.5; there are {', '.join(TERMS)}"
            )
    return weights


def _check_number(name: str, value: Any, kind: str, low: float, high: float) -> None:
    if not (isinstance(value, int | float) and math.isfinite(value) and low <= value <= high):
        raise UsageError(f"training option {name}={value!r} must be {low:g} to {high:g}")
    if kind.startswith("int") and value != int(value):
        raise UsageError(f"training option {name}={value!r} must be a whole number")


def _numbers(name: str, value: Any) -> tuple:
    values = (value,) if isinstance(value, int | float) else value
    if not isinstance(values, list | tuple) or not all(isinstance(v, int | float) for v in values):
        raise UsageError(f"training option {name}={value!r} must be a list of numbers")
    if name == "crop" and len(values) != 2:
        raise UsageError(f"training option crop={value!r} must be two numbers")
    return tuple(values)
