"""A register is marked in every sentence, by many words, none of which is always there."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from qwen_scope import lab

WORD = re.compile(r"[^\W\d_]+")


def cues(code: str, text: str) -> set[str]:
    if code in ("zh", "ja"):
        # One kana says nothing; one Chinese character may be a word.
        return {
            text[i : i + n]
            for n in ((1, 2) if code == "zh" else (2,))
            for i in range(len(text))
            if text[i : i + n].isalpha()
        }
    return set(WORD.findall(text.lower()))


def sentences(code: str, register: str, split: str = "train") -> list[set[str]]:
    return [
        cues(code, document.text[span.start : span.end])
        for document in lab.documents(split, n=60, kinds=["talk"], languages=[code], registers=[register])
        for span in document.spans
    ]


@pytest.mark.parametrize("code", lab.LANGUAGES)
def test_registers_have_many_cues_and_no_single_mark(code: str):
    plain = Counter(word for words in sentences(code, "plain") for word in words)
    for register in ("polite", "rude", "archaic"):
        found = sentences(code, register)
        counts = Counter(word for words in found for word in words)
        # A cue is a word several times as frequent here as in plain speech.
        marks = {word for word, n in counts.items() if n >= 3 and plain[word] * 4 < n}
        assert len(marks) >= 20
        assert sum(bool(words & marks) for words in found) / len(found) > 0.97
        assert max(counts[word] for word in marks) / len(found) < 0.85
        new = sentences(code, register, "heldout_templates")
        assert sum(bool(words & marks) for words in new) / len(new) > 0.9
