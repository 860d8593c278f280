"""Everything about a dataset seen as features: pure functions of `Firing` tables. Never meets a model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
