"""Small files to type commands on: texts, prompts and tables as users have them, drawn from the lab's grammar."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from .corpus import documents
from .prompts import arithmetic_prompts, chat_prompts, neutral_prompts
from .types import LANGUAGES as ALL

TEXTS, LANGUAGES = 60, ("en", "de", "fr", "es")


def example_files(seed: int = 0) -> dict[str, str]:
    """The contents of the example files by name; the same for the same seed.

    `german.txt`, `french.txt`, `others.txt` (the other languages), `rude.txt` and `polite.txt` hold a text per line,
    `prompts.txt` beginnings that say nothing about the language. `sums.jsonl` has columns `prompt` and `answer`,
    `questions.jsonl` `prompt` and `language`, `corpus.jsonl` `id`, `text`, `language` and `register`.
    """
    return {
        "german.txt": lines(talk(seed, TEXTS, "de")),
        "french.txt": lines(talk(seed, TEXTS, "fr")),
        "others.txt": lines(talk(seed, TEXTS, *(code for code in ALL if code not in ("de", "fr")))),
        "rude.txt": lines(talk(seed, TEXTS, *LANGUAGES, register="rude")),
        "polite.txt": lines(talk(seed, TEXTS, *LANGUAGES, register="polite")),
        "prompts.txt": lines(prompt.text for prompt in neutral_prompts(seed, 24)),
        "sums.jsonl": rows(
            {"prompt": prompt.text, "answer": str(prompt.expected)} for prompt in arithmetic_prompts(seed, 12)
        ),
        "questions.jsonl": rows(
            {"prompt": prompt.text, "language": prompt.language} for prompt in chat_prompts(seed, 24)
        ),
        "corpus.jsonl": rows(
            {"id": one.id, "text": one.text, "language": one.language, "register": one.register}
            for language in LANGUAGES
            for register in ("rude", "polite")
            for one in documents(seed=seed + 1, n=12, kinds=["talk"], languages=[language], registers=[register])
        ),
    }


def talk(seed: int, n: int, *languages: str, register: str | None = None) -> Iterable[str]:
    """Texts of people talking."""
    registers = None if register is None else [register]
    found = documents(seed=seed, n=n, kinds=["talk"], languages=languages, registers=registers)
    return (one.text for one in found)


def lines(texts: Iterable[str]) -> str:
    """A text per line."""
    return "".join(" ".join(text.split("\n")) + "\n" for text in texts)


def rows(columns: Iterable[Mapping[str, str | None]]) -> str:
    """JSON Lines."""
    return "".join(json.dumps(dict(one), ensure_ascii=False) + "\n" for one in columns)
