"""Features and recipes inside stock vLLM, per request: a plugin of vLLM, and what starts a server with it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
