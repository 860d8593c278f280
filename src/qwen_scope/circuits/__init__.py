"""Why this token: nodes, effects, edges and graphs of features, checked by ablation."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
