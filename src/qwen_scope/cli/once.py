"""What all processes that `torchrun` started run into is said by one of them."""

from __future__ import annotations

import os


def said_elsewhere(sentence: str) -> bool:
    """Whether another of the processes that `torchrun` started has said it: what all run into is worth saying once."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    from qwen_scope.sae import said_before

    return said_before(sentence)
