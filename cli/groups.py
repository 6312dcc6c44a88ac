"""Options that commands share, as one parameter: a dataclass with an option for each field."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from inspect import Parameter, Signature, signature
from typing import Any, get_type_hints

from fmupsample_cli import options as o
from fmupsample_cli import videos as v


@dataclass
class PipelineOptions:
    """Which models see the pictures, how, and on what they compute."""

    backbone: o.BackboneName = "embedded"
    layer: o.Layer = None
    backbone_weights: o.BackboneWeights = None
    views: o.Views = 1
    upsampler: o.UpsamplerName = None
    head: o.Head = None
    image_size: o.ImageSizeOption = None
    fit: o.Fit = o.FitMode.resize
    device: o.Device = "auto"
    backend: o.Backend = o.BackendName.auto
    precision: o.Precision = o.PrecisionName.fp32
    batch_size: o.BatchSize = None
    workers: o.Workers = None
    window: o.Window = None
    max_memory: o.MaxMemory = None

    def check(self) -> None:
        """Raise a UsageError for what cannot be understood, before torch is imported."""
        from fmupsample.images.size import ImageSize

        if self.image_size is not None:
            ImageSize.parse(self.image_size)


@dataclass
class Span:
    """Which frames of videos."""

    every: v.Every = None
    start: v.From = None
    stop: v.To = None


def expand(command: Callable[..., Any]) -> Callable[..., Any]:
    """``command`` as Typer reads it: with the fields of its dataclasses as options of their own."""
    hints = get_type_hints(command, include_extras=True)
    groups = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    if not groups:
        return command

    @functools.wraps(command)
    def called(**given: Any) -> Any:
        for name, kind in groups.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in fields(kind)})
        return command(**given)

    parameters = list(_flat(command, groups, hints))
    called.__signature__ = Signature(parameters)
    called.__annotations__ = {p.name: p.annotation for p in parameters}
    return called


def _flat(
    command: Callable[..., Any], groups: dict[str, type], hints: dict[str, Any]
) -> Iterator[Parameter]:
    for name, parameter in signature(command).parameters.items():
        if name not in groups:
            yield parameter.replace(annotation=hints[name], kind=Parameter.KEYWORD_ONLY)
            continue
        of_fields = get_type_hints(groups[name], include_extras=True)
        for field in fields(groups[name]):
            yield Parameter(
                field.name, Parameter.KEYWORD_ONLY, default=field.default,
                annotation=of_fields[field.name],
            )  # fmt: skip
