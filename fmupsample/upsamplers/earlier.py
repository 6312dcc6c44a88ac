"""Head files of earlier versions, in today's words."""

from __future__ import annotations

from typing import Any

from fmupsample.errors import HeadError

# "resfu" and "resfu-universal" were one class of many forms. Fields that only its other form has:
_OF_RESFU = ("stem", "middle", "groups", "similarity", "neighbours")
_OF_CELLS = {"keys": "learned", "taper": False, "sigma_space": None, "sigma_range": None}


def in_todays_words(name: str, config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The method and configuration of a head file, whatever version wrote it.

    Raises:
        HeadError: a form that does not exist any more.
    """
    if name not in ("resfu", "resfu-universal"):
        return name, config
    if config.get("similarity") == "distance" and config.get("stem", True):
        kept = {key: value for key, value in config.items() if key not in _OF_RESFU}
        return "bilateral-cells", kept
    if name == "resfu" and all(config.get(key, plain) == plain for key, plain in _OF_CELLS.items()):
        return name, {key: value for key, value in config.items() if key not in _OF_CELLS}
    raise HeadError(
        "it holds paired differences with a prior or with projected keys, which this version does "
        "not compute: train a head of resfu or bilateral-cells"
    )
