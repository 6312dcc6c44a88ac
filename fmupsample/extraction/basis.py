"""The basis of ``extract --pca``: one for all pictures of an output folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fmupsample._version import __version__
from fmupsample.atomic import replacing
from fmupsample.errors import OutputError
from fmupsample.extraction.plan import PCA_NAME, ExtractOptions, describe, options_hash
from fmupsample.extraction.projection import Projection, ProjectionFit
from fmupsample.images import Source
from fmupsample.pipeline import Pipeline
from fmupsample.progress import Progress

# The basis is computed from at most so many pictures, evenly spaced over the run.
PCA_PICTURES = 256


def _basis_hash(pipeline: Pipeline, options: ExtractOptions) -> str:
    described = describe(pipeline, options)
    keys = ("backbone_fingerprint", "layer", "precision", "image_size", "fit", "pca")
    return options_hash(
        {key: described[key] for key in (*keys, "views", "window") if key in described}
    )


def saved_basis(pipeline: Pipeline, options: ExtractOptions, out: Path) -> Projection | None:
    """The basis of an earlier run with these options, so that new pictures fit the old ones."""
    path = out / PCA_NAME
    if options.pca is None or not path.exists():
        return None
    basis, meta = Projection.load(path)
    return basis if meta.get("basis_hash") == _basis_hash(pipeline, options) else None


def fit_basis(
    pipeline: Pipeline,
    options: ExtractOptions,
    out: Path,
    sources: Sequence[Source],
    progress: Progress,
) -> Projection | None:
    """Compute the basis from ``sources`` and save it in ``out``; ``None``: no picture is usable.

    Pictures that cannot be used are passed over; they are reported when their turn comes.

    Raises:
        OutputError: the basis cannot be written.
    """
    assert options.pca is not None
    step = max(1, -(-len(sources) // PCA_PICTURES))
    chosen = sources[::step]
    fit = ProjectionFit(pipeline.backbone.channels)
    progress.start(len(chosen), "PCA basis")
    for item in pipeline.items(chosen, on_error=lambda source, error: progress.advance()):
        fit.add(pipeline.tokens(item))
        progress.advance()
    if fit.count == 0:
        return None
    basis = fit.solve(options.pca)
    meta = {
        "tool": f"fmupsample {__version__}",
        "basis_hash": _basis_hash(pipeline, options),
        "pictures": str(len(chosen)),
        **{k: str(v) for k, v in describe(pipeline, options).items()},
    }
    try:
        with replacing(out / PCA_NAME) as temporary:
            basis.save(temporary, meta)
    except OSError as error:
        raise OutputError(f"cannot write {out / PCA_NAME}: {error.strerror}") from error
    return basis
