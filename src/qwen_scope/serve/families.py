"""The architectures of vLLM that are served: a changed subclass of each, under its own name in vLLM's registry.

All their blocks return `(hidden, residual)`. A further architecture with such blocks is one name here, and a run of
`tests/serve` with a small model of it.
"""

from __future__ import annotations

import importlib
from typing import Any

from .guard import ARCHITECTURES, MODELS, REGISTER
from .seam_worker import make_state
from .worker import STATE, state_of


def register() -> None:
    """Put the changed classes into vLLM's registry; nothing is imported before a model of theirs is loaded."""
    known, put = MODELS.find(), REGISTER.find()
    for name in ARCHITECTURES:
        if name in known:
            put(name, f"{__name__}:{name}")


def __getattr__(name: str) -> Any:
    """The changed class of an architecture, made on first use, when vLLM resolves the name that was registered."""
    if name not in ARCHITECTURES:
        raise AttributeError(name)
    module, kind = MODELS.find()[name][:2]
    place = module if "." in module else f"vllm.model_executor.models.{module}"
    base: Any = getattr(importlib.import_module(place), kind)

    class Served(base):
        def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
            state = make_state(self, vllm_config) if not prefix else None
            object.__setattr__(self, STATE, state)  # not a module: its tensors are no weights

        def compute_logits(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            logits = super().compute_logits(hidden_states, *args, **kwargs)
            state = state_of(self)
            return logits if state is None else state.judged(logits)

    Served.__name__ = Served.__qualname__ = base.__name__
    Served.__module__ = __name__
    globals()[name] = Served
    return Served
