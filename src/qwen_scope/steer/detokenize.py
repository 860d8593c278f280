"""Token ids to text while they arrive, never showing half a character."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

HALF = "\ufffd"


class Pieces:
    """Turns ids into text one by one; the pieces join to the decoded whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = self._read = 0

    def push(self, token_id: int) -> str:
        """What is certain once this token is known; nothing while a character is incomplete."""
        self._ids.append(token_id)
        before, now = self._window()
        if now.endswith(HALF) or len(now) <= len(before):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def rest(self) -> str:
        """What was held back, incomplete as it is."""
        before, now = self._window()
        self._start = self._read = len(self._ids)
        return now[len(before) :]

    def _window(self) -> tuple[str, str]:
        """The text of the last tokens shown, and of those with all that came after: a token's text may depend on it."""
        return self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def shown(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token shows: a character split over several tokens shows at the first, the others are empty."""
    pieces, texts, first = Pieces(tokenizer), [""] * len(ids), 0
    for i, token_id in enumerate(ids):
        if piece := pieces.push(token_id):
            texts[first] = piece
            first = i + 1
    if first < len(ids):
        texts[first] = pieces.rest()
    return texts
