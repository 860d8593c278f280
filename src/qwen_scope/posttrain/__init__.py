"""Features as a training signal for the language model: losses on TRL's trainers, and a watch on drift."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
