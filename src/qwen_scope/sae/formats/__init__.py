"""The layouts SAEs are stored in: one pure function to read each, one to write it. Inside there is one orientation."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
