"""``fmupsample models``: which backbones there are, and where their weights are."""

from __future__ import annotations

import fnmatch
import json
from math import prod
from typing import Annotated, Any

import typer

from fmupsample.wording import human_bytes
from fmupsample_cli.options import Json
from fmupsample_cli.progress import note
from fmupsample_cli.report import is_narrow, print_json, print_table


def models(
    pattern: Annotated[
        str | None,
        typer.Argument(
            metavar="[PATTERN]",
            help="Part of a name, tag or description, or a quoted glob such as 'dino*'.",
            show_default=False,
        ),
    ] = None,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Every pretrained model of timm, not only those with an alias."),
    ] = False,
    upsamplers: Annotated[
        bool,
        typer.Option("--upsamplers", help="Upsamplers instead: what they need and what they cost."),
    ] = False,
    as_json: Json = False,
) -> None:
    """List backbones: shipped, cached, or downloaded at first use.

    Any of these names goes to --backbone: an alias, a tag, or a timm name. Sizes are those of
    the weights as they are shipped, cached or downloaded. With --upsamplers, the names that go to
    --upsampler.
    """
    if upsamplers:
        _list_upsamplers(pattern, as_json)
        return
    found = [row for row in _rows() if _matches(row, pattern)]
    if everything:
        listed = {row["tag"] for row in found}
        found += [row for row in _timm_rows(listed) if _matches(row, pattern)]
    if as_json:
        print_json(found)
        return
    if not found:
        more = "" if everything else "; `fmupsample models --all` looks at all of timm"
        note(f"no backbone matches {pattern!r}{more}")
        raise typer.Exit(1)
    rows = [
        [
            row["name"] or "",
            row["tag"],
            "" if row["channels"] is None else row["channels"],
            "" if row["stride"] is None else row["stride"],
            "" if row["params_millions"] is None else f"{row['params_millions']:.1f}M",
            _state(row),
            ", ".join(row["heads"]),
            row["description"],
        ]
        for row in found
    ]
    columns = ["name", "timm tag", "channels", "stride", "params", "weights", "head", "what it is"]
    # A column that nothing fills only takes width from the others, and in a narrow window the
    # aliases say more than the tags and numbers.
    hidden = set()
    if is_narrow(130) and not everything:
        hidden = {"timm tag"} | ({"stride", "params"} if is_narrow(100) else set())
    used = [
        i
        for i, column in enumerate(columns)
        if column not in hidden and any(row[i] != "" for row in rows)
    ]
    print_table(
        [columns[i] for i in used],
        [[row[i] for i in used] for row in rows],
        right=("channels", "stride", "params"),
    )


# Costs are given for a small ViT: its channels, patches of 14 pixels, a picture of 224.
_CHANNELS, _CELLS, _PIXELS = 384, (16, 16), (224, 224)


def _list_upsamplers(pattern: str | None, as_json: bool) -> None:
    from fmupsample.upsamplers.catalogue import catalogue

    rows = [
        {
            "name": entry.method.name,
            "kind": entry.method.needs,
            "needs": entry.needs,
            "guidance": entry.guidance,
            "ratio": entry.ratio,
            "linear_in_value": entry.linear,
            "parameters": entry.cost.parameters,
            "macs": entry.cost.macs,
            "description": entry.method.summary,
            "channels": _CHANNELS,
            "cells": _CELLS,
            "pixels": _PIXELS,
        }
        for entry in catalogue(_CHANNELS, _CELLS, _PIXELS)
    ]
    rows = [row for row in rows if _matches({**row, "tag": ""}, pattern)]
    if as_json:
        print_json(rows)
        return
    if not rows:
        note(f"no upsampler matches {pattern!r}")
        raise typer.Exit(1)
    columns = ["name", "needs", "guidance", "ratio", "params", "GMACs", "what it is"]
    table = [
        [
            row["name"],
            row["needs"],
            row["guidance"] or "none",
            row["ratio"],
            f"{row['parameters']:,}",
            f"{row['macs'] / 1e9:.3f}",
            row["description"],
        ]
        for row in rows
    ]
    print_table(columns, table, right=("params", "GMACs"))
    note(
        f"for {_CHANNELS} channels, {_CELLS[0]}x{_CELLS[1]} cells to {_PIXELS[0]}x{_PIXELS[1]} "
        "pixels"
    )
    from fmupsample.upsamplers.official.checkpoints import CHECKPOINTS

    names = {row["name"] for row in rows}
    for each in CHECKPOINTS:
        if each.method in names:
            state = "for --head FILE"
            if each.bytes is not None:
                state = "cached" if each.path.is_file() else f"download {human_bytes(each.bytes)}"
            note(f"{each.method}: {each.name}, {state}, {each.url} ({each.credit})")


def _rows() -> list[dict[str, Any]]:
    """The embedded model and the aliases, without importing torch or timm."""
    from fmupsample.backbones.aliases import ALIASES
    from fmupsample.backbones.cache import find_in_cache

    heads = known_heads()
    rows = [row] if (row := _embedded_row(heads)) else []
    for name, alias in ALIASES.items():
        path = find_in_cache(alias.repository)
        rows.append(
            {
                "name": name,
                "tag": alias.tag,
                "channels": alias.channels,
                "stride": alias.stride,
                "params_millions": alias.params,
                "state": "cached" if path else "download",
                "bytes": path.stat().st_size if path else alias.download_bytes,
                "heads": heads.get(alias.tag, []),
                "description": alias.description,
            }
        )
    return rows


def _embedded_row(heads: dict[str, list[str]]) -> dict[str, Any] | None:
    from fmupsample_weights import find_weights, read_metadata

    path = find_weights("embedded")
    if path is None:
        return None
    metadata = read_metadata(path)
    tag = metadata.get("tag", "embedded")
    card = _json(metadata.get("card"))
    return {
        "name": "embedded",
        "tag": tag,
        "channels": card.get("channels"),
        "stride": card.get("stride"),
        "params_millions": round(_count_parameters(path) / 1e6, 1),
        "state": "shipped",
        "bytes": path.stat().st_size,
        "heads": heads.get(tag, []),
        "description": f"default, works offline ({metadata.get('architecture', 'ViT')})",
    }


def _count_parameters(path) -> int:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return sum(prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return 0


def known_heads() -> dict[str, list[str]]:
    """Full backbone name -> names of the heads on this machine, cached and shipped."""
    from fmupsample.folders import cache_folder
    from fmupsample_weights import list_weights, read_metadata

    heads: dict[str, list[str]] = {}
    for path in [*sorted((cache_folder() / "heads").glob("*.safetensors")), *list_weights()]:
        metadata = read_metadata(path)
        backbone = _json(metadata.get("backbone")).get("name")
        if metadata.get("format", "").startswith("fmupsample-head/") and backbone:
            heads.setdefault(backbone, []).append(path.stem)
    return heads


def _timm_rows(listed: set[str]) -> list[dict[str, Any]]:
    """Every other pretrained model of timm; how large they are is not known before the download."""
    note("asking timm for its models ...")
    import timm

    from fmupsample.backbones.hub import cached_file, cached_names

    heads = known_heads()
    cached = set(cached_names())
    rows = []
    for tag in timm.list_pretrained():
        if tag in listed:
            continue
        path = cached_file(tag) if tag in cached else None
        rows.append(
            {
                "name": None,
                "tag": tag,
                "channels": None,
                "stride": None,
                "params_millions": None,
                "state": "cached" if path else "download",
                "bytes": path.stat().st_size if path else None,
                "heads": heads.get(tag, []),
                "description": "",
            }
        )
    return rows


def _matches(row: dict[str, Any], pattern: str | None) -> bool:
    if not pattern:
        return True
    wanted = pattern.lower()
    texts = [(row["name"] or "").lower(), row["tag"].lower(), row["description"].lower()]
    if any(sign in wanted for sign in "*?["):
        return any(fnmatch.fnmatchcase(text, wanted) for text in texts)
    return any(wanted in text for text in texts)


def _state(row: dict[str, Any]) -> str:
    return row["state"] if row["bytes"] is None else f"{row['state']} {human_bytes(row['bytes'])}"


def _json(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
