"""Runs over many images: ``sources -> pipeline -> job -> store``.

A *job* (:mod:`.job`) says what is written for an image; :mod:`fmupsample.jobs` has those of the
commands. The *plan* (:mod:`.plan`) compares what is wanted with what the *store* (:mod:`.store`:
the output folder with its manifest; :mod:`.sharded`: the same in tar files) holds. The *engine*
(:mod:`.engine`) does what is left, decoding ahead and writing behind. :mod:`.workers` shares a run
between the processes of ``torchrun``, :mod:`.ray` lets a cluster do it.
"""
