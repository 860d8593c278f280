"""The command line: parse, call, print. One thin file per room; nothing heavy is imported before a command runs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
