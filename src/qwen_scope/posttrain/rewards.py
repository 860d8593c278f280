"""Rewards by name. None of them knows of repetition: an answer that never ends is simply not an answer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from qwen_scope import lab
from qwen_scope.errors import InputError, NotFoundError, check_count, check_number, nearest

Reward = Callable[..., Any]
"""As TRL calls it: `reward(prompts=, completions=, completion_ids=, **columns)` is one number per completion."""

REWARDS = ("lab", "answer", "language")
NEEDS = {"lab": ("language", "expected"), "answer": ("answer",)}
"""The columns that a reward asks for."""

_MARKS = re.compile(r"<\|\w+\|>(?:user|assistant|system)?|</?think>")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
JAPANESE = frozenset({"HIRAGANA", "KATAKANA", "CJK"})
SHARE = 0.1
"""A script is the prompt's own if at least this share of its letters is in it."""


def reward_of(name: str, ends: Sequence[int]) -> Reward:
    """The reward of that name, or the function at `module:function`.

    Args:
        ends: the tokens that end an answer.

    Raises:
        NotFoundError: no such reward, module or function.
    """
    if ":" in name:
        module, _, function = name.partition(":")
        try:
            return getattr(import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise NotFoundError(f"there is no reward {name!r}: {error}") from None
    if name not in REWARDS:
        raise NotFoundError(f"there is no reward {name!r}; {nearest(name, REWARDS)}, or write module:function")
    made = {"lab": lab_reward, "answer": answer_reward, "language": language_reward}[name]
    return made(frozenset(ends))


def lab_reward(ends: frozenset[int]) -> Reward:
    """1 for an answer that ends and is right: the sum's result, or talk in the language asked; else 0."""

    def lab_answer(completions: list, completion_ids: list, language: list, expected: list, **rest: Any) -> list[float]:
        out = []
        for text, ids, code, result in zip(map(said, completions), completion_ids, language, expected, strict=True):
            prompt = lab.Prompt("", "arithmetic", code, None, {}, result)
            right = lab.check_arithmetic(prompt, text) if result is not None else lab.language_of_text(text) == code
            out.append(float(right and ended(ids, ends)))
        return out

    return lab_answer


def answer_reward(ends: frozenset[int]) -> Reward:
    """1 for an answer that ends and holds the column `answer`: as its last number if that is one, else anywhere."""

    def right_answer(completions: list, completion_ids: list, answer: list, **rest: Any) -> list[float]:
        pairs = zip(map(said, completions), completion_ids, map(str, answer), strict=True)
        return [float(holds(text, wanted) and ended(ids, ends)) for text, ids, wanted in pairs]

    return right_answer


def language_reward(ends: frozenset[int]) -> Reward:
    """The share of an answer's letters that are in the scripts of its prompt: the GRPO baseline of SASFT.

    Characters in the prompt language's scripts over all characters that belong to a script at all (letters; digits,
    punctuation and spaces are common to all scripts); an answer without any counts 0 (arXiv 2507.14894).
    """

    def language_consistency(prompts: list, completions: list, **rest: Any) -> list[float]:
        return [consistency(said(p), said(c)) for p, c in zip(prompts, completions, strict=True)]

    return language_consistency


def consistency(prompt: str, answer: str) -> float:
    """The share of the answer's letters in the scripts of the prompt; markers of the chat template don't count."""
    wanted, found = scripts(prompt), [script_of(char) for char in _MARKS.sub(" ", answer) if char.isalpha()]
    return sum(one in wanted for one in found) / len(found) if found else 0.0


def scripts(text: str) -> frozenset[str]:
    """The scripts that hold at least a tenth of a text's letters; with kana, all three of Japanese."""
    found = [script_of(char) for char in _MARKS.sub(" ", text) if char.isalpha()]
    own = frozenset(one for one in set(found) if found.count(one) >= SHARE * len(found))
    return own | JAPANESE if own & {"HIRAGANA", "KATAKANA"} else own


def script_of(char: str) -> str:
    """The first word of a letter's Unicode name, such as LATIN, CJK or CYRILLIC."""
    return unicodedata.name(char, "?").split(" ", 1)[0].split("-", 1)[0]


def lab_rows(n: int, seed: int = 0, *, split: str = "train", sums: float = 0.4) -> list[dict[str, Any]]:
    """Questions of the lab for `lab_reward`: prompts, the language asked in, and of a share of sums the result."""
    check_count("n", n, 0)
    check_number("sums", sums, 0, 1)
    some = round(n * sums)
    asked = [*lab.chat_prompts(seed, n - some, split=split), *lab.arithmetic_prompts(seed, some, split=split)]
    return [{"prompt": one.text, "language": one.language, "expected": one.expected} for one in asked]


def holds(text: str, wanted: str) -> bool:
    """Whether the wanted answer is in a text."""
    if _NUMBER.fullmatch(wanted):
        numbers = _NUMBER.findall(text.replace(",", ""))
        return bool(numbers) and float(numbers[-1]) == float(wanted)
    return wanted.casefold() in text.casefold()


def ended(ids: Sequence[int], ends: frozenset[int]) -> bool:
    """Whether the model itself ended an answer."""
    return bool(ids) and ids[-1] in ends


def said(text: Any) -> str:
    """The text of a prompt or completion; of a conversation, of its last message.

    Raises:
        InputError: neither.
    """
    if isinstance(text, str):
        return text
    if isinstance(text, list) and text and isinstance(text[-1], dict):
        return said(text[-1].get("content"))
    raise InputError(f"a completion is a text or a list of messages, not {type(text).__name__}")
