"""What AnyUp, JAFAR and NAF share: encoders of the image, and how they run over large images.

:mod:`.networks` has the layers, with gradients. Without, they run over :mod:`.maps` that are
stored or made again, tile by tile: 1x1 layers by :mod:`.steps`, 3x3 convolutions by
:mod:`.winograd`. :mod:`.image` puts them together for AnyUp and JAFAR. :mod:`.runs` says which
pixels attend to the same cells, for AnyUp and NAF.
"""
