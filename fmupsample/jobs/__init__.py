"""What the commands write for each image: the jobs of :mod:`fmupsample.runs`."""
