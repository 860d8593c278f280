"""Text to tokens: documents from wherever they are, chats and their phases, which tokens count, packing."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
