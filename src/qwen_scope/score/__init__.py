"""Scoreboards: figures of an SAE beside those of controls that learnt less, on the same tokens."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
