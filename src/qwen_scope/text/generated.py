"""The phase of tokens as they are generated."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int8
from transformers import PreTrainedTokenizerBase

from qwen_scope.errors import InputError

from .chat import template_of
from .markers import atoms, is_marker, learn
from .options import Chat
from .phases import PHASES, Phase

_MARKER = 64  # characters of the text so far in which a marker of several tokens can begin


class GenerationPhases:
    """Follows one generated text token by token and says the phase of each.

    A block runs from the token that opens it (`<think>`, `<tool_call>`) to the one that closes it, with the whitespace
    after it; all else is `answer`. The end of a turn right after a tool call belongs to the call. These are the phases
    that `Rendered.spans` gives the same tokens, apart from a marker of several tokens: its first ones are `answer`
    until it is complete.

    Example:
        phases = GenerationPhases(tokenizer, "thinking", rendered.next_phase)
        for token in generated: phases.feed(token)
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: Chat | None, first: Phase) -> None:
        """Start after a prompt.

        Args:
            chat: the mode that the prompt was rendered in, None for a plain text.
            first: the prompt's `Rendered.next_phase`; `text` makes every token `text`.

        Raises:
            InputError: a phase that no generation begins in, or a tokenizer without chat template.
        """
        if first not in ("text", "thinking", "answer"):
            raise InputError(f"a generation begins in text, thinking or answer, not {first!r}")
        if (chat is None) != (first == "text"):
            raise InputError(
                f"a plain text goes on as text and a conversation doesn't; got the chat mode {chat!r} and {first!r}"
            )
        self._tokenizer = tokenizer
        self._opens: list[tuple[str | int, Phase]] = []  # a marker of one token by its id, another by its text
        self._closes: dict[Phase, str | int] = {}
        self._ends: set[int] = set()
        if chat is not None:
            markers = learn(template_of(tokenizer, chat))
            pairs: list[tuple[Phase, tuple[str | None, str | None]]] = [
                ("thinking", markers.think or (None, None)),
                ("tool_call", markers.call),
            ]
            for phase, (opens, closes) in pairs:
                if opens and closes:
                    self._opens.append((self._marker(opens), phase))
                    self._closes[phase] = self._marker(closes)
            ends = (self._marker(atom) for atom in atoms(markers.ends.get("assistant", "")) if is_marker(atom))
            self._ends = {end for end in ends if isinstance(end, int)}
        self._phase: Phase = first
        self._closed: Phase | None = None  # the block that just closed
        self._recent = ""
        self._texts: dict[int, str] = {}

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases that a generated token can have; `thinking` and `tool_call` where the template marks them."""
        return ("text",) if self._phase == "text" else ("answer", *self._closes)

    @property
    def phase(self) -> Phase:
        """The phase of the next token, unless it opens a block."""
        return self._phase

    def feed(self, token: int) -> Phase:
        """The phase of the next generated token."""
        token = int(token)
        if self._phase == "text":
            return "text"
        self._recent = self._recent[-_MARKER:] + self._text(token)
        if self._phase in self._closes:
            phase = self._phase
            if self._seen(self._closes[phase], token):
                self._phase, self._closed, self._recent = "answer", phase, ""
            return phase
        for marker, phase in self._opens:
            if self._seen(marker, token):
                self._phase, self._closed, self._recent = phase, None, ""
                return phase
        if self._closed and (self._text(token).isspace() or (self._closed == "tool_call" and token in self._ends)):
            return self._closed
        self._closed = None
        return "answer"

    def follow(self, tokens: Iterable[int]) -> Int8[np.ndarray, " seq"]:
        """The phases of the next tokens as indices into `PHASES`, `(seq,)` int8."""
        return np.array([PHASES.index(self.feed(token)) for token in tokens], np.int8)

    def _seen(self, marker: str | int, token: int) -> bool:
        return token == marker if isinstance(marker, int) else marker in self._recent

    def _marker(self, marker: str) -> str | int:
        ids = self._tokenizer(marker, add_special_tokens=False)["input_ids"]
        return ids[0] if len(ids) == 1 else marker

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = str(self._tokenizer.decode([token]))
        return self._texts[token]
