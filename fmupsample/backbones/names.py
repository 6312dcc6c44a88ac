"""From what a person types to one pretrained timm model."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import timm
from timm.models import get_pretrained_cfg, is_model

from fmupsample.backbones.aliases import ALIASES, OTHER_NAMES
from fmupsample.errors import BackboneError

EMBEDDED = "embedded"


@dataclass(frozen=True)
class Resolved:
    """A name that timm knows: ``architecture`` and the ``tag`` of its pretrained weights."""

    asked: str
    architecture: str
    tag: str  # "" if timm has no pretrained weights for the architecture

    @property
    def full(self) -> str:
        """``architecture.tag``, the name used everywhere inside."""
        return f"{self.architecture}.{self.tag}" if self.tag else self.architecture


def resolve(name: str) -> Resolved:
    """The timm model that ``name`` means: an alias, ``architecture`` or ``architecture.tag``.

    An architecture without tag gets timm's default tag. ``timm/`` and ``hf-hub:timm/`` in front
    are allowed, as hub pages show them.

    Raises:
        BackboneError: no such model or tag; the message names similar ones.
    """
    asked = name.strip()
    plain = asked.removeprefix("hf-hub:").removeprefix("hf_hub:").removeprefix("timm/")
    alias = ALIASES.get(plain.lower())
    architecture, _, tag = (alias.tag if alias else plain).partition(".")
    if not architecture or not is_model(architecture):
        if alias:
            raise BackboneError(
                f"{asked} stands for {alias.tag}, which the installed timm {timm.__version__} does "
                "not have yet; update it with `pip install -U timm`"
            )
        raise BackboneError(_unknown(asked, plain))
    if not tag:
        cfg = get_pretrained_cfg(architecture)
        tag = (cfg.tag or "") if cfg is not None and cfg.has_weights else ""
    elif f"{architecture}.{tag}" not in (known := timm.list_pretrained(f"{architecture}.*")):
        tags = [full.partition(".")[2] for full in known]
        shown = ", ".join(tags[:8]) + (", ..." if len(tags) > 8 else "")
        raise BackboneError(
            f"timm {timm.__version__} has no weights {tag!r} for {architecture}; "
            + (f"there are {shown}" if tags else "it has none for this architecture")
        )
    return Resolved(asked, architecture, tag)


def _unknown(asked: str, plain: str) -> str:
    alias = OTHER_NAMES.get(plain.lower())
    similar = [alias] if alias else suggestions(plain)
    hint = f"; did you mean {', '.join(similar)}?" if similar else ""
    return (
        f"there is no backbone {asked!r}: neither an alias nor a model of timm "
        f"{timm.__version__}{hint} (`fmupsample models` lists the aliases, "
        "`fmupsample models --all` everything)"
    )


def suggestions(name: str, count: int = 4) -> list[str]:
    """Aliases and timm architectures that look like ``name``, the likeliest first."""
    plain = name.lower().partition(".")[0].strip()
    if not plain:
        return [EMBEDDED]
    short = [EMBEDDED, *ALIASES]
    known = timm.list_models()
    dashed, underscored = plain.replace("_", "-"), plain.replace("-", "_")
    found = difflib.get_close_matches(dashed, short, n=count, cutoff=0.6)
    found += [alias for alias in short if alias.startswith(dashed)]
    found += [model for model in known if model.startswith(underscored)]
    found += difflib.get_close_matches(underscored, known, n=count, cutoff=0.7)
    return list(dict.fromkeys(found))[:count]
