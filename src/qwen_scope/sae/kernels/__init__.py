"""The arithmetic: a reference first, then paths that never hold a (tokens, d_sae) tensor over a budget."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
