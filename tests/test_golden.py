"""Outputs of the authors' own modules, where the files are at hand.

FMUPSAMPLE_GOLDEN names a folder of npz files with ``state/...``, ``in/...``, ``out/upsampled`` and
``meta`` (the configuration, with its ``kind``). They are not shipped.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import fmupsample

FOLDER = os.environ.get("FMUPSAMPLE_GOLDEN")
FILES = sorted(Path(FOLDER).glob("*.npz")) if FOLDER else []


@pytest.mark.skipif(not FILES, reason="FMUPSAMPLE_GOLDEN names no folder of golden files")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_official_modules_are_reproduced(path):
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    meta = ast.literal_eval(str(arrays["meta"]))
    state = {k[6:]: torch.tensor(v) for k, v in arrays.items() if k.startswith("state/")}
    guidance = arrays.get("in/guidance")
    up = fmupsample.load_official(meta.pop("kind"), state, **meta)
    with torch.no_grad():
        out = up(
            torch.tensor(arrays["in/features"]),
            None if guidance is None else torch.tensor(guidance),
        )
    torch.testing.assert_close(out, torch.tensor(arrays["out/upsampled"]), atol=1e-12, rtol=0)
