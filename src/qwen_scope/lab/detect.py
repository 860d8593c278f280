"""Which language a text of the lab is in: by script first, by the lab's own words among Latin-script languages."""

from __future__ import annotations

import re
from functools import cache

from .grammar import load
from .types import LANGUAGES, REGISTERS

_LATIN: tuple[str, ...] = ("en", "fr", "de", "es")
_WORD = re.compile(r"[^\W\d_]+")
_SCRIPTS = {
    "hangul": "\uac00-\ud7a3",
    "kana": "\u3041-\u3096\u30a1-\u30fa\u30fc",
    "han": "\u3400-\u4dbf\u4e00-\u9fff",
    "cyrillic": "\u0400-\u04ff",
    "arabic": "\u0620-\u064a\u0671-\u06d3",
    "latin": "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f",
}
_LETTERS = {script: re.compile(f"[{letters}]") for script, letters in _SCRIPTS.items()}
_TAGS = re.compile(r"<\|im_\w+\|>(?:user|assistant)?|</?think>")


def script_counts(text: str) -> dict[str, int]:
    """How many letters of each script a text has."""
    return {script: len(letters.findall(text)) for script, letters in _LETTERS.items()}


def language_of_text(text: str) -> str | None:
    """The language most of the text is in, or None where nothing in it is known to the lab.

    Chat markers do not count. Japanese is told from Chinese by its kana.
    """
    text = _TAGS.sub(" ", text)
    counts = script_counts(text)
    east = counts["kana"] + counts["han"]
    japanese = counts["kana"] * 8 >= east
    shares = {
        "ko": counts["hangul"],
        "ja": east if japanese else 0,
        "zh": 0 if japanese else east,
        "ru": counts["cyrillic"],
        "ar": counts["arabic"],
        "latin": counts["latin"],
    }
    best = max(shares, key=lambda name: shares[name])
    if not shares[best]:
        return None
    return _latin(text) if best == "latin" else best


def _latin(text: str) -> str | None:
    weights = _vocabulary()
    scores: dict[str, float] = dict.fromkeys(_LATIN, 0.0)
    for word in _WORD.findall(text.lower()):
        for code, weight in weights.get(word, {}).items():
            scores[code] += weight
    best = max(scores, key=lambda code: scores[code])
    return best if scores[best] else None


@cache
def _vocabulary() -> dict[str, dict[str, float]]:
    """Per word, the weight it gives to each Latin-script language: more for a word few of them share."""
    words: dict[str, set[str]] = {}
    for code in (code for code in LANGUAGES if code in _LATIN):
        language = load(code)
        texts = [form for entries in language.lexicon.values() for entry in entries.values() for form in entry.values()]
        templates = [t for register in REGISTERS for t in language.templates[register]]
        templates += [t for found in language.phrases.values() for t in found]
        for template in templates:
            for part in template.parts:
                texts += [part] if isinstance(part, str) else part.options
        texts += [text for side in (language.openers, language.closers) for found in side.values() for text in found]
        for word in _WORD.findall(" ".join(texts).lower()):
            words.setdefault(word, set()).add(code)
    return {word: dict.fromkeys(codes, 1 / len(codes) ** 2) for word, codes in words.items()}
