"""The logits behind the last token, without those of all others."""

from __future__ import annotations

import inspect
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from .hooks import packed_head


def last_logits(model: nn.Module, **inputs: Any) -> Float[Tensor, "batch vocab"]:
    """What a language model says behind the last token of every row.

    Logits of all tokens are as large as the vocabulary times the text, for a long one most of the memory; a model that
    can (`logits_to_keep`) is asked for the last ones alone.

    Args:
        inputs: as `model.forward` takes them, such as `input_ids` or `inputs_embeds`.
    """
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = 1
    with packed_head(model):
        return model(use_cache=False, **inputs).logits[:, -1]
