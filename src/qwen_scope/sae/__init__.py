"""The dictionary: its maths, its files and its names. Knows no language model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
