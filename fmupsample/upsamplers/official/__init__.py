"""Modules with the parameters of the authors' own code.

Researchers have checkpoints trained with the official implementations; these load them under their
own parameter names and reproduce their outputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial

from torch import Tensor

from fmupsample.errors import UsageError
from fmupsample.upsamplers.base import Upsampler
from fmupsample.upsamplers.registry import METHODS, require_in_library, resolve


def load_official(kind: str, state_dict: Mapping[str, Tensor], **config) -> Upsampler:
    """Build an upsampler from an official implementation's parameters.

    Args:
        kind: one of those below.
        state_dict: the official parameter names and tensors.
        config: the official configuration, by its names there; what follows from the parameters'
            shapes need not be given, and ``ratio`` is ignored where the method does any (it comes
            from the sizes). Official border modes are used.

            * ``resfu``: ``ratio``, ``groups``, ``embedding_dim``, ``kernel_size``;
            * ``sapa``, ``sapa-b``, ``sapa-g``: ``ratio``, ``kernel_size``, ``embedding_dim``;
            * ``lda-aqu``: ``ratio``, ``nh``, ``n_groups``, ``range_factor``, ``k_u``;
            * ``dysample``: ``scale``, ``style``, ``groups``, ``dyscope``;
            * ``carafe`` (mmcv's ``CARAFEPack``): ``scale_factor``, ``up_kernel``;
            * ``fade`` (its ``L2H`` form, with or without the gate);
            * ``featup`` (``JBUStack``);
            * ``anyup``: ``num_heads``, ``window_ratio``;
            * ``jafar``: ``num_heads``;
            * ``naf``: ``heads_attn``, ``kernel_size``;
            * ``uplift`` (its form for ViTs).

    Returns:
        the module, in evaluation mode, with the dtype of the given parameters. Call it as
        ``up(features, guidance)``.

    Raises:
        UsageError: an unknown kind or configuration key.
        HeadError: parameters missing, left over, or of other shapes.
    """
    loaders = {name: place for row in METHODS.values() for name, place in row.official.items()}
    require_in_library(kind)
    if kind not in loaders:
        raise UsageError(f"load_official knows {sorted(loaders)}, not {kind!r}")
    builder = resolve(loaders[kind])
    bound = builder.keywords if isinstance(builder, partial) else {}
    known = [name for name in list(inspect.signature(builder).parameters)[1:] if name not in bound]
    unknown = sorted(set(config) - set(known))
    if unknown:
        raise UsageError(f"official {kind} has no option {', '.join(unknown)}; it has {known}")
    return builder(dict(state_dict), **config)
