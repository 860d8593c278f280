"""Conversations of a steered model about paragraphs: what it answers turn by turn, and what a change does to that."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_scope import Intervention, Scope
from qwen_scope.errors import InputError
from qwen_scope.steer import Decoding, Generation, generate, next_token_kl
from qwen_scope.steer import Row as Scored

NEW, TURNS, LONGEST = 24, 3, 500  # tokens of an answer; questions; letters of a paragraph


def said(scope: Scope, prompts: Sequence[Any], ways: Sequence[Intervention] = (), new: int = NEW) -> list[Generation]:
    """Greedy answers, under the interventions."""
    how = Decoding(max_new_tokens=new)
    return generate(scope.model, scope.tokenizer, prompts, ways, saes=scope.saes, decoding=how, chat=chat_of(scope))


def chat_of(scope: Scope) -> Any:
    return "default" if scope.tokenizer.chat_template else None


def ids_of(scope: Scope, prompts: Sequence[Any]) -> list[list[int]]:
    tokens = scope.tokenize(prompts, chat=chat_of(scope))
    return [ids[:n].tolist() for ids, n in zip(tokens.input_ids, tokens.lengths, strict=True)]


def mean(values: np.ndarray) -> float:
    """Over the tokens of an answer; 0 of one that is empty."""
    return float(values.mean()) if len(values) else 0.0


def conversations(data: Path, seed: int) -> list[dict[str, Any]]:
    """Short English paragraphs with their first questions and answers, in an order drawn by the seed."""
    with gzip.open(data / "xquad.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    some = [
        {"text": row["text"].strip(), "questions": row["questions"][:TURNS], "answers": row["answers"][:TURNS]}
        for row in rows
        if row["language"] == "en" and len(row["questions"]) >= TURNS and len(row["text"]) <= LONGEST
    ]
    return [some[i] for i in np.random.default_rng(seed).permutation(len(some))]


def talked(
    scope: Scope, talks: Sequence[Mapping[str, Any]], interventions: Sequence[Intervention]
) -> tuple[list[list[bool]], list[list[dict[str, str]]]]:
    """Every conversation to its end: per turn whether the answers hold the right one, and what was said."""
    history: list[list[dict[str, str]]] = [[] for _ in talks]
    rights = []
    for turn in range(TURNS):
        for talk, so_far in zip(talks, history, strict=True):
            before = f"{talk['text']}\n\nAnswer in a few words. " if turn == 0 else ""
            so_far.append({"role": "user", "content": before + talk["questions"][turn]})
        answers = said(scope, history, interventions)
        right = [talk["answers"][turn].strip(" .").casefold() for talk in talks]
        rights.append([one in answer.text.casefold() for one, answer in zip(right, answers, strict=True)])
        for so_far, one in zip(history, answers, strict=True):
            so_far.append({"role": "assistant", "content": one.text.strip() or "."})
    return rights, history


def spans(scope: Scope, history: Sequence[Sequence[Mapping[str, str]]]) -> list[tuple[Scored, list[slice]]]:
    """Every conversation as one row that counts from its first answer on, and where in that each answer stands.

    Raises:
        InputError: the chat template writes what was said before anew with every turn.
    """
    out = []
    for talk in history:
        begins = [ids_of(scope, [list(talk[: 2 * turn + 1])])[0] for turn in range(TURNS)]
        said = [
            scope.tokenizer(talk[2 * turn + 1]["content"], add_special_tokens=False)["input_ids"]
            for turn in range(TURNS)
        ]
        row = Scored((*begins[-1], *said[-1]), len(begins[0]))
        if any(list(row.ids[: len(one)]) != one for one in begins):
            raise InputError("the chat template changes earlier turns, so that their answers can't be scored together")
        starts = [len(one) - row.start for one in begins]
        out.append((row, [slice(at, at + len(ids)) for at, ids in zip(starts, said, strict=True)]))
    return out


def kl_by_turn(
    scope: Scope, talks: Sequence[tuple[Scored, Sequence[slice]]], interventions: Sequence[Intervention]
) -> np.ndarray:
    """`(turns, conversations)`: the mean KL over the tokens of an answer."""
    found = next_token_kl(scope.model, [row for row, _ in talks], interventions, scope.saes)
    return np.array([[mean(kl[some]) for some in where] for kl, (_, where) in zip(found, talks, strict=True)]).T
