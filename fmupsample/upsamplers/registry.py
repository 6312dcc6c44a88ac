"""Every upsampling method, one row each: what all lists, tables, loaders and charts read.

A method is added by its file and a row here. Rows say where a class is (``"sapa:SAPA"``) and not
the class itself, so that listing the methods imports nothing.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fmupsample.errors import FmupsampleError, RenamedWarning, UsageError

if TYPE_CHECKING:
    from fmupsample.upsamplers.base import Upsampler


_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Needs(StrEnum):
    """What a method needs before it can upsample the features of a frozen backbone."""

    NOTHING = "free"  # it has no parameters
    ANY_HEAD = "universal"  # a head that serves every backbone
    OWN_HEAD = "head"  # a head trained for the backbone


@dataclass(frozen=True)
class Method:
    """A row.

    Attributes:
        name: the word for ``--upsampler``, in head files and in manifests.
        kind: its class, or ``"module:Class"`` below ``fmupsample.upsamplers``.
        config: the class of its configuration, in the same way; ``None``: its class takes plain
            arguments and has no parameters.
        needs: see :class:`Needs`.
        title: what drawings call it.
        summary: what it does, in a few words.
        own_heads: of one whose heads serve every backbone: heads of one backbone can be trained
            too; ``specialised(channels)`` of its class makes one of the former.
        formerly: names in files of earlier versions; an unregistered one may still be asked for.
        in_decoders: :func:`~fmupsample.upsamplers.build_for_decoder` builds it.
        exportable: :mod:`fmupsample.exporting` has a plain form for each of its steps.
        official: what :func:`~fmupsample.load_official` calls the authors' modules, and what loads
            the parameters of each (``"module:function"``).

    What it costs is the business of its class (``Upsampler.cost``).
    """

    name: str
    kind: type[Upsampler] | str
    config: type | str | None
    needs: Needs
    title: str
    summary: str
    own_heads: bool = False
    formerly: tuple[str, ...] = ()
    in_decoders: bool = False
    exportable: bool = False
    official: Mapping[str, str] = field(default_factory=dict)

    @property
    def learned(self) -> bool:
        """Whether its head can be trained for a frozen backbone, and kept in a file."""
        return self.needs in (Needs.ANY_HEAD, Needs.OWN_HEAD)

    def options(self, channels: int, asked: Mapping[str, Any] = _NOTHING) -> dict[str, Any]:
        """What :meth:`build` takes for features of so many channels, with what is asked for."""
        return {"channels": 0 if self.needs == Needs.ANY_HEAD else channels, **asked}

    def build(self, options: Mapping[str, Any]) -> Upsampler:
        """A new module with untrained parameters.

        Args:
            options: fields of its configuration, or the arguments of its class.

        Raises:
            UsageError: a configuration it does not take.
        """
        kind = resolve(self.kind)
        try:
            if self.config is None:
                return kind(**options)
            return kind(resolve(self.config).from_dict(dict(options)))
        except FmupsampleError:
            raise
        # What numbers that cannot be lead to: groups of 0, channels of -1, words for numbers.
        except (TypeError, ValueError, ArithmeticError, RuntimeError, AttributeError) as error:
            raise UsageError(f"the configuration of {self.name} is unusable: {error}") from error


def resolve(place: Any) -> Any:
    """``"module:name"`` below ``fmupsample.upsamplers`` -> the object; others as they are."""
    if not isinstance(place, str):
        return place
    module, _, name = place.partition(":")
    return getattr(import_module(f"fmupsample.upsamplers.{module}"), name)


def _operators(*names: str) -> dict[str, str]:
    return {name: f"official.operators:load_{name}" for name in names}


_ATTENTION = "official.attention:load_"
_ROWS = (
    Method(
        "nearest", "classic:Nearest", None, Needs.NOTHING, "Nearest",
        "every pixel takes its cell's features", in_decoders=True, exportable=True,
    ),
    Method(
        "bilinear", "classic:Bilinear", None, Needs.NOTHING, "Bilinear",
        "bilinear interpolation", in_decoders=True, exportable=True,
    ),
    Method(
        "bicubic", "classic:Bicubic", None, Needs.NOTHING, "Bicubic",
        "bicubic interpolation", in_decoders=True,
    ),
    Method(
        "jbu", "jbu:JointBilateral", None, Needs.NOTHING, "Joint bilateral",
        "joint bilateral: cells of like colour", exportable=True,
    ),
    Method(
        "guided", "guided:GuidedFilter", None, Needs.NOTHING, "Guided filter",
        "guided filter: locally affine in the picture", exportable=True,
    ),
    Method(
        "affinity", "affinity:Affinity", "affinity:AffinityConfig", Needs.ANY_HEAD, "Affinity",
        "cells of the pixel's object, learned from masks", exportable=True,
    ),
    Method(
        "anyup", "anyup:AnyUp", "anyup:AnyUpConfig", Needs.ANY_HEAD, "AnyUp",
        "attention to the cells in a window", official={"anyup": "official.encoders:load_anyup"},
    ),
    Method(
        "naf", "naf:NAF", "naf:NAFConfig", Needs.ANY_HEAD, "NAF",
        "attention to 9 x 9 cells, by the picture alone",
        official={"naf": "official.naf:load_naf"},
    ),
    Method(
        "bilateral-cells", "bilateral:BilateralCells", "bilateral:BilateralCellsConfig",
        Needs.ANY_HEAD, "Bilateral cells", "cells near in place, colour and features",
        exportable=True, own_heads=True, formerly=("resfu-universal", "resfu"),
    ),
    Method(
        "jafar", "jafar:JAFAR", "jafar:JAFARConfig", Needs.OWN_HEAD, "JAFAR",
        "attention to all cells", official={"jafar": "official.encoders:load_jafar"},
    ),
    Method(
        "resfu", "resfu:ReSFU", "resfu:ReSFUConfig", Needs.OWN_HEAD, "ReSFU",
        "similarity by paired differences, of bilinear samples", in_decoders=True, exportable=True,
        official={"resfu": "official.resfu:load_resfu"},
    ),
    Method(
        "uplift", "uplift:UPLiFT", "uplift:UPLiFTConfig", Needs.OWN_HEAD, "UPLiFT",
        "17 cells around, doubled step by step", official={"uplift": "official.uplift:load_uplift"},
    ),
    Method(
        "sapa", "sapa:SAPA", "sapa:SAPAConfig", Needs.OWN_HEAD, "SAPA",
        "similarity of picture and features, gated", in_decoders=True, exportable=True,
        official={
            "sapa": f"{_ATTENTION}sapa",
            "sapa-b": f"{_ATTENTION}sapa_b",
            "sapa-g": f"{_ATTENTION}sapa_g",
        },
    ),
    Method(
        "lda-aqu", "lda_aqu:LDAAQU", "lda_aqu:LDAAQUConfig", Needs.OWN_HEAD, "LDA-AQU",
        "self-attention to neighbours that move", in_decoders=True, exportable=True,
        official={"lda-aqu": f"{_ATTENTION}lda_aqu"},
    ),
    Method(
        "fade", "fade:FADE", "fade:FADEConfig", Needs.OWN_HEAD, "FADE",
        "kernels from picture and features", in_decoders=True, official=_operators("fade"),
    ),
    Method(
        "carafe", "stack:CARAFEStack", "stack:StackConfig", Needs.OWN_HEAD, "CARAFE",
        "kernels from the features", in_decoders=True, exportable=True,
        official=_operators("carafe"),
    ),
    Method(
        "dysample", "stack:DySampleStack", "stack:StackConfig", Needs.OWN_HEAD, "DySample",
        "samples at learned places", in_decoders=True, exportable=True,
        official=_operators("dysample"),
    ),
    Method(
        "featup", "stack:LearnedBilateralStack", "stack:StackConfig", Needs.OWN_HEAD, "FeatUp",
        "learned joint bilateral, stage by stage", in_decoders=True,
        official=_operators("featup"),
    ),
    Method(
        "deconvolution", "stack:DeconvolutionStack", "stack:StackConfig", Needs.OWN_HEAD,
        "Deconvolution", "transposed convolutions", in_decoders=True,
    ),
    Method(
        "pixel-shuffle", "stack:PixelShuffleStack", "stack:StackConfig", Needs.OWN_HEAD,
        "Pixel shuffle", "sub-pixel convolutions", in_decoders=True,
    ),
)  # fmt: skip
METHODS: dict[str, Method] = {row.name: row for row in _ROWS}
_IN_EXAMPLES = ("indexnet", "a2u", "max-unpooling")


def require_in_library(name: str) -> None:
    """Raise a UsageError for a method of earlier versions that is with the examples now."""
    if name in _IN_EXAMPLES:
        raise UsageError(
            f"{name} is a part of encoder-decoders only, and is no method of the library any more: "
            "it stands in examples/decoders, ready to be copied"
        )


def current_name(name: str) -> str:
    """Today's name of the method called ``name``, which may be an earlier one; others as they are.

    Capitals do not matter, nor ``_`` for ``-``. A warning says what an earlier one is called now.
    """
    plain = name.strip().lower().replace("_", "-")
    if plain in METHODS:
        return plain
    row = next((row for row in METHODS.values() if plain in row.formerly), None)
    if row is None:
        return name
    warnings.warn(f"the upsampler {name} is now called {row.name}", RenamedWarning, stacklevel=3)
    return row.name


def similar(name: str, names: Sequence[str]) -> str:
    """``"; did you mean X?"`` where one of ``names`` is like ``name``, else ``""``."""
    near = difflib.get_close_matches(name.strip().lower().replace("_", "-"), names, 1)
    return f"; did you mean {near[0]}?" if near else ""


def names_in_files(name: str) -> tuple[str, ...]:
    """The name and the earlier ones under which files may know a method."""
    return (name, *METHODS[name].formerly) if name in METHODS else (name,)


def upsampler_names() -> tuple[str, ...]:
    """The words for ``--upsampler``."""
    return tuple(METHODS)


def learned_names(*needs: Needs) -> tuple[str, ...]:
    """Those with head files; with ``needs``, those of such heads."""
    return tuple(
        name for name, row in METHODS.items() if row.learned and (not needs or row.needs in needs)
    )


def any_backbone_names() -> tuple[str, ...]:
    """Those whose heads serve the features of any backbone, the best first."""
    return learned_names(Needs.ANY_HEAD)


def either(names: Sequence[str]) -> str:
    """``"a, b or c"``, for sentences."""
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def decoder_names() -> tuple[str, ...]:
    """The words for :func:`~fmupsample.upsamplers.build_for_decoder`."""
    return tuple(name for name, row in METHODS.items() if row.in_decoders)


def learned_method(name: str) -> Method:
    """The row of an upsampler that head files hold.

    Its modules are built from one configuration object, kept as ``module.config``, which turns into
    a mapping and back (``to_dict``, ``from_dict``) and has the number of feature ``channels`` among
    its fields, 0 for those that take any.

    Raises:
        UsageError: no such upsampler.
    """
    if name not in learned_names():
        known = learned_names()
        raise UsageError(
            f"{name!r} is not an upsampler with parameters: {', '.join(known)}"
            f"{similar(name, known)}"
        )
    return METHODS[name]
