"""The prefix cache's key: what was done to the tokens of a block.

A key for the whole request would be wrong: what one request generates is the next turn's prompt, and a recipe that
tells the two apart did something else to it. So a block's key is the recipe with which of its operations apply to each
of the block's tokens. Blocks that nothing touches carry no key and are shared with everybody; vLLM chains the hashes,
so what was done to earlier tokens counts as well. What a request generates whose watches may switch a recipe on is
shared with nobody.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .kinds import Kinds
from .protocol import FIELD, Ask, text_of
from .rows import Pattern

_KNOWN = "_qwen_scope_places"


class BlockPlaces:
    """Which operations of one request apply to its tokens, asked block by block in the engine's process."""

    def __init__(self, ask: Ask, tokenizer: Callable[[], PreTrainedTokenizerBase]) -> None:
        self.fingerprint = ask.fingerprint
        self.pattern = Pattern.of(one.where for one in ask.interventions)
        self.kinds = None if ask.phases is None or not self.pattern.by_phase else Kinds(ask.phases, tokenizer())
        switches = any(watch.then == "switch" for watch in ask.watch)
        self.private = uuid.uuid4().hex if switches else None

    def key(self, request: Any, start: int, end: int) -> tuple[str, str] | None:
        """What tells this block apart, or None for one that nothing touches.

        Args:
            request: vLLM's request, with its tokens so far.
            start, end: the positions of the block's tokens.
        """
        if self.private is not None and end > request.num_prompt_tokens:
            return FIELD, self.private  # a recipe may have been switched on, which the workers alone know
        phases = None
        if self.kinds is not None:
            ids = request.all_token_ids
            phases = self.kinds.between(start, end, lambda first, last: ids[first:last])
        codes = self.pattern.codes(np.arange(start, end), request.num_prompt_tokens, phases)
        if not codes.any():
            return None
        if (codes == codes[0]).all():
            return FIELD, f"{self.fingerprint}:{codes[0]:x}"
        return FIELD, f"{self.fingerprint}:{hashlib.sha256(codes.tobytes()).hexdigest()}"


def block_key(
    request: Any, start: int, end: int, tokenizer: Callable[[], PreTrainedTokenizerBase]
) -> tuple[str, str] | None:
    """`BlockPlaces.key` of vLLM's request, which keeps what was found out about it."""
    known = request.__dict__.get(_KNOWN, False)
    if known is False:
        text = text_of(request.sampling_params)
        ask = None if text is None else Ask.from_text(text)
        needed = ask is not None and (ask.interventions or any(watch.then == "switch" for watch in ask.watch))
        known = BlockPlaces(ask, tokenizer) if ask is not None and needed else None
        request.__dict__[_KNOWN] = known
    return None if known is None else known.key(request, start, end)
