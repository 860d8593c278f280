"""The Hugging Face model inside the objects of other libraries; none of them is imported for it."""

from __future__ import annotations

from typing import Any


def unwrapped(model: Any) -> Any:
    """The module whose blocks run when somebody runs `model`: that of a `TransformerBridge` of TransformerLens, of a
    `LanguageModel` of nnsight, else the object itself."""
    kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(model).__mro__}
    if "transformer_lens.TransformerBridge" in kinds:
        return model.original_model
    if kinds & {"nnsight.NNsight", "nnsight.Envoy"}:
        return model._module
    return model


def tokenizer_of(model: Any) -> Any:
    """The tokenizer that such an object carries; None where it is a model alone."""
    return None if unwrapped(model) is model else getattr(model, "tokenizer", None)
