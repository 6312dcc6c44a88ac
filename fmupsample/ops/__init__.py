"""Operators: reassembly and the coordinates it works on. Depends on torch alone."""

from fmupsample.ops.reassembly import reassemble, similarity
from fmupsample.ops.sampled import reassemble_at, reassemble_points
from fmupsample.ops.window import reassemble_window, similarity_window

__all__ = [
    "reassemble",
    "reassemble_at",
    "reassemble_points",
    "reassemble_window",
    "similarity",
    "similarity_window",
]
