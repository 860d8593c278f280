"""The lab's grammar: a seeded corpus in nine languages whose every document and sentence carries its factors."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
