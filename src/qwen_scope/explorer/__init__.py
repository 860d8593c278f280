"""The web page: what the other rooms compute, to be seen, compared and turned. It computes nothing itself."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
