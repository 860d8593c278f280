"""qwen-scope: look into, steer and train Qwen models through sparse autoencoders."""

import lazy_loader

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("qwen-scope")
    return _load(name)
