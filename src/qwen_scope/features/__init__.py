"""Everything about one feature: finding, showing, naming and exporting it, and testing whether it is causal."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
