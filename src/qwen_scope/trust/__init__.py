"""How far to trust a feature: its card, what the card measures, and the rules that make one word of it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
