"""Files on disk: tensors in three formats, the manifest of a run, names that do not collide."""

from fmupsample.writers.formats import FORMATS, TensorFile, check_format, file_bytes
from fmupsample.writers.manifest import Manifest
from fmupsample.writers.names import output_names

__all__ = ["FORMATS", "Manifest", "TensorFile", "check_format", "file_bytes", "output_names"]
