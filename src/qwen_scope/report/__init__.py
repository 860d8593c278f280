"""Plain data in, text out: tables and token shading. Knows nothing of models, SAEs or stores."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
