"""Videos: which frames are meant (span, clips), reading them (frames), writing one (write).

sources = find_images(["holiday"], videos=True)
clips = scan_videos(sources, Span(every=5, start=10, stop=20))
extract(pipeline, with_frames(sources, clips), Path("features"))
"""

from fmupsample.video.clips import Clip, scan, scan_videos, wanted_clips
from fmupsample.video.frames import Film, FrameReader, FrameSource, films_of, with_frames
from fmupsample.video.span import Span, parse_time, show_time

# fmupsample.video.write is imported by itself. OpenCV is imported when a video is opened.

__all__ = [
    "Clip",
    "Film",
    "FrameReader",
    "FrameSource",
    "Span",
    "films_of",
    "parse_time",
    "scan",
    "scan_videos",
    "show_time",
    "wanted_clips",
    "with_frames",
]
