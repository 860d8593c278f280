"""`ask`: from a text and a question in words to a prompt's tokens and a quantity."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_scope.sae import parse_feature
from qwen_scope.scope import Scope
from qwen_scope.text import Chat

from .options import Question
from .quantity import Quantity, most_likely, next_logits, one_token


@dataclass(frozen=True)
class Asked:
    """A prompt as the model reads it, and what is asked about it.

    Attributes:
        ids, tokens: of the whole prompt, as ids and as texts.
        quantity: its position counts as in the question.
    """

    ids: list[int]
    tokens: list[str]
    quantity: Quantity


def ask(scope: Scope, text: str, question: Question, *, chat: Chat | None = None) -> Asked:
    """Read a prompt and a question; where no token is named, the model says which it finds most likely.

    Raises:
        InputError: a token that is none or several, or a position past the end.
    """
    one, other = (None if word is None else one_token(scope, word) for word in (question.token, question.against))
    found = scope.tokenize([text], chat=chat)
    ids, tokens, position = found.input_ids[0].tolist(), list(found.strings[0]), question.position
    if question.of is not None:
        layer, feature = parse_feature(question.of)
        return Asked(ids, tokens, Quantity.activation(layer, feature, position))
    if one is None:
        at = Quantity.logit(0, position=position).at(len(ids)).position
        best = most_likely(next_logits(scope, ids[: at + 1]), 2)
        one = next(word for word, _ in best if word != other)
    if other is not None:
        return Asked(ids, tokens, Quantity.difference(one, other, position))
    return Asked(ids, tokens, (Quantity.log_prob if question.log_prob else Quantity.logit)(one, position=position))
