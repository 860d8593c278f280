"""Makes what the lab ships: tiny models, their SAEs, and the card that says how good they are."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
