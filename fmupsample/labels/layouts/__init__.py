"""Where pictures and their labels lie: a module for each way in which people keep them.

A layout is a module with

- ``NAME`` and ``WHAT``: its word on the command line, and what it is;
- ``recognises(images, labels)``: whether this looks like it (``labels`` may be ``None``: one root);
- ``find(images, labels, split)``: the pairs, as :class:`Found`.

To add one, write the module and put it into ``LAYOUTS``; the first that recognises its data is
taken, so that special ones stand before general ones.
"""

from __future__ import annotations

from types import ModuleType

from fmupsample.labels.layouts import ade20k, cityscapes, coco, folders, voc
from fmupsample.labels.layouts.matching import Found, Pair

LAYOUTS: dict[str, ModuleType] = {
    module.NAME: module for module in (voc, cityscapes, ade20k, coco, folders)
}

__all__ = ["LAYOUTS", "Found", "Pair"]
