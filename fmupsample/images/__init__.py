"""Pictures: finding, decoding, sizing and preparing them for a backbone."""

from fmupsample.images.find import (
    EXTENSIONS,
    VIDEO_EXTENSIONS,
    Source,
    as_sources,
    find_images,
    is_video,
    printable,
    storable,
)
from fmupsample.images.read import read_image, read_picture, read_size
from fmupsample.images.size import (
    Frame,
    ImageSize,
    check_image_size,
    check_output_size,
    parse_output_size,
    plan_frame,
)

# fmupsample.images.prepare is imported by itself: it needs torch, and finding pictures must not.

__all__ = [
    "EXTENSIONS",
    "VIDEO_EXTENSIONS",
    "Frame",
    "ImageSize",
    "Source",
    "as_sources",
    "check_image_size",
    "check_output_size",
    "find_images",
    "is_video",
    "parse_output_size",
    "plan_frame",
    "printable",
    "read_image",
    "read_picture",
    "read_size",
    "storable",
]
