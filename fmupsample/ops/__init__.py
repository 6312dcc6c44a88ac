"""Operators: reassembly and the coordinates it works on. Depends on torch alone."""

from fmupsample.ops.reassembly import reassemble

__all__ = ["reassemble"]
