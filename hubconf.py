"""For ``torch.hub.load("OWNER/fmupsample", METHOD)``: every upsampler, and the backbones.

    up = torch.hub.load("OWNER/fmupsample", "affinity")                     # serves any backbone
    backbone = torch.hub.load("OWNER/fmupsample", "backbone", "dinov2-s")
    up = torch.hub.load("OWNER/fmupsample", "resfu", backbone=backbone, pretrained=False)

Methods are called as for ``--upsampler``, with ``_`` for ``-``.
"""

import importlib.util
import sys
from pathlib import Path

dependencies = ["torch", "timm"]


def _find_weights():
    """A checkout has the package of weights under another name than an installation."""
    if importlib.util.find_spec("fmupsample_weights") is not None:
        return
    path = Path(__file__).parent / "weights" / "__init__.py"
    options = {"submodule_search_locations": [str(path.parent)]}
    spec = importlib.util.spec_from_file_location("fmupsample_weights", path, **options)
    sys.modules["fmupsample_weights"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["fmupsample_weights"])


_find_weights()

from fmupsample.upsamplers.loading import upsampler_named as _upsampler_named  # noqa: E402
from fmupsample.upsamplers.registry import upsampler_names as _upsampler_names  # noqa: E402


def backbone(name="embedded", *, device="cpu", **options):
    """A frozen backbone: ``fmupsample.load_backbone(name, **options)``, on ``device``."""
    from fmupsample import load_backbone

    return load_backbone(name, **options).to(device)


def _entry(name):
    def load(backbone=None, *, pretrained=True, device="cpu", **options):
        return _upsampler_named(name, backbone, pretrained=pretrained, **options).to(device)

    load.__name__ = name.replace("-", "_")
    load.__doc__ = f"The upsampler {name}, for ``backbone`` where its head is for one alone."
    return load


for _name in _upsampler_names():
    globals()[_name.replace("-", "_")] = _entry(_name)
