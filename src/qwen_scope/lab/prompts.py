"""Beginnings for a model to continue, each made to measure one thing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from qwen_scope.errors import NotFoundError, check_count

from . import chat, neutral
from .dice import Dice
from .mixture import default_mixture
from .page import Page
from .types import LANGUAGES, REGISTERS, SPLITS, Prompt, check_names


def neutral_prompts(seed: int = 0, n: int = 100) -> Iterator[Prompt]:
    """`n` prefixes without a language, which the grammar continues in each language with the mixture's shares."""
    check_count("n", n, 0)
    return (_neutral(f"neutral|{seed}|{i}") for i in range(n))


def _neutral(key: str) -> Prompt:
    form, text = neutral.prefix(Dice(key))
    # Tokenisers join a space to the word behind it, so a prompt ends before its space.
    return Prompt(text.rstrip(" "), "neutral", None, None, {"form": form})


def chat_prompts(
    seed: int = 0,
    n: int = 100,
    languages: Iterable[str] | None = None,
    registers: Iterable[str] | None = None,
    split: str = "train",
) -> Iterator[Prompt]:
    """`n` chat questions about a topic, up to where the answer begins, with the think block empty.

    Raises `NotFoundError` for an unknown language, register or split.
    """
    check_count("n", n, 0)
    spoken = check_names("language", languages, LANGUAGES)
    toned = check_names("register", registers, REGISTERS)
    check_names("split", (split,), SPLITS)
    return (_question(f"chat|{seed}|{i}|{split}", "chat", spoken, toned, split) for i in range(n))


def _question(key: str, kind: str, spoken: tuple[str, ...], toned: tuple[str, ...], split: str) -> Prompt:
    dice = Dice(key)
    code, register = dice.pick(spoken), dice.pick(toned)
    page = Page()
    question = chat.ask(code, register, split, dice, "sum" if kind == "arithmetic" else "topic")
    chat.open_chat(page, question, dice, empty_think=True)
    expected = question.total.value if question.total else None
    return Prompt(page.text, kind, code, register, question.factors, expected)


def drift_prompts(seed: int = 0, n: int = 100, into: str = "zh", split: str = "train") -> Iterator[Prompt]:
    """`n` chat questions whose answers should not contain the language `into`, but in this corpus sometimes do.

    Languages appear in proportion to how often they drift into it. Raises `NotFoundError` for a language that
    nothing drifts into.
    """
    check_count("n", n, 0)
    check_names("language", (into,), LANGUAGES)
    check_names("split", (split,), SPLITS)
    mixture = default_mixture()
    sources = {code: row[into] for code, row in mixture.drift.items() if row.get(into)}
    if not sources:
        intruders = sorted({code for row in mixture.drift.values() for code in row})
        raise NotFoundError(f"nothing drifts into {into!r}; the corpus drifts into {', '.join(intruders)}")
    registers = mixture.registers

    def prompt(i: int) -> Prompt:
        key = f"drift|{seed}|{i}|{into}|{split}"
        dice = Dice(f"{key}|who")
        asked = _question(key, "drift", (dice.weighted(sources),), (dice.weighted(registers),), split)
        return replace(asked, factors={**asked.factors, "into": into})

    return (prompt(i) for i in range(n))


def arithmetic_prompts(
    seed: int = 0,
    n: int = 100,
    languages: Iterable[str] | None = None,
    registers: Iterable[str] | None = None,
    split: str = "train",
) -> Iterator[Prompt]:
    """`n` chat questions about a sum, each with its `expected` result for `check_arithmetic`.

    Raises `NotFoundError` for an unknown language, register or split.
    """
    check_count("n", n, 0)
    spoken = check_names("language", languages, LANGUAGES)
    toned = check_names("register", registers, REGISTERS)
    check_names("split", (split,), SPLITS)
    return (_question(f"arithmetic|{seed}|{i}|{split}", "arithmetic", spoken, toned, split) for i in range(n))
