"""Tasks that steering must not break: questions with one right answer."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qwen_scope.errors import FormatError, InputError
from qwen_scope.files import parse_value, text_lines
from qwen_scope.scope import Scope
from qwen_scope.steer import Decoding, Intervention, SAEsByLayer, generate
from qwen_scope.text import Chat

from .validate import Task


def read_task(path: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """Prompts and answers, as `answer_task` takes them, from lines of `{"prompt": "...", "answer": "..."}`.

    Raises:
        InputError: no such file, not text, or no line.
        FormatError: a line that is not an object with a prompt and an answer.
    """
    file, pairs = Path(path), []
    for number, line in enumerate(read_texts(file), 1):
        try:
            data = parse_value(line, f"line {number} of {file.name}")
        except FormatError:
            data = None
        if not isinstance(data, dict) or not all(isinstance(data.get(key), str) for key in ("prompt", "answer")):
            raise FormatError(f'line {number} of {file.name} is not {{"prompt": "...", "answer": "..."}}')
        pairs.append((data["prompt"], data["answer"]))
    return pairs


def read_texts(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        InputError: no such file, not text, or no line.
    """
    file = Path(path)
    try:
        lines = text_lines(file.read_bytes().decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the prompts in {str(file)!r} can't be read: {type(error).__name__}") from None
    if not lines:
        raise InputError(f"{str(file)!r} holds no prompt")
    return lines


def answer_task(
    scope: Scope,
    pairs: Sequence[tuple[str, str]],
    *,
    chat: Chat | None = None,
    max_new_tokens: int = 40,
    saes: SAEsByLayer | None = None,
) -> Task:
    """Accuracy on questions: 1 where the greedy continuation holds the answer as a whole word, else 0.

    Args:
        pairs: prompts and answers.
        chat: render each prompt with the chat template.

    Raises:
        InputError: fewer than two questions, or an empty answer.
    """
    if len(pairs) < 2 or not all(answer.strip() for _, answer in pairs):
        raise InputError("a task has at least two questions, each with an answer that is not empty")
    prompts = [prompt for prompt, _ in pairs]
    patterns = [re.compile(rf"(?<!\w){re.escape(answer.strip())}(?!\w)") for _, answer in pairs]
    decoding = Decoding(max_new_tokens=max_new_tokens)

    def right(interventions: list[Intervention]) -> np.ndarray:
        tools = {"saes": saes or scope.saes, "stats": scope.stats, "decoding": decoding, "chat": chat}
        made = generate(scope.model, scope.tokenizer, prompts, interventions, **tools)
        pairs = zip(patterns, made, strict=True)
        return np.array([float(pattern.search(one.text) is not None) for pattern, one in pairs])

    return right
