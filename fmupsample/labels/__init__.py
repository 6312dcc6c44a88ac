"""Labelled pictures: finding pairs in the layouts people have, reading them, naming the classes.

Nothing here imports torch: what is wrong with the labels is said before a model is loaded.
"""

from fmupsample.labels.classes import IGNORE, ClassTable
from fmupsample.labels.dataset import Dataset, open_dataset
from fmupsample.labels.layouts import LAYOUTS, Found, Pair
from fmupsample.labels.parsing import parse_classes, parse_ignore
from fmupsample.labels.surveys import Survey, survey
from fmupsample.labels.values import count_classes, read_labels, read_values

__all__ = [
    "IGNORE",
    "LAYOUTS",
    "ClassTable",
    "Dataset",
    "Found",
    "Pair",
    "Survey",
    "count_classes",
    "open_dataset",
    "parse_classes",
    "parse_ignore",
    "read_labels",
    "read_values",
    "survey",
]
