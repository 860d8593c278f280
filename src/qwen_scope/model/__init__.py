"""Any Hugging Face decoder: where the residual stream is, reading and changing it. No SAE."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
