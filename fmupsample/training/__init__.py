"""Training heads for frozen backbones; :func:`~fmupsample.training.run.train` is the way in.

``run`` puts a run together and ``loop`` does its steps; ``objective`` says what for, ``data``,
``crops`` and ``regions`` on what, ``config`` with which numbers.
"""
