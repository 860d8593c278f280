"""`Quantity`: the number of a forward pass that a graph explains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.errors import InputError, check_count
from qwen_scope.model import input_device, last_logits
from qwen_scope.scope import Scope
from qwen_scope.text import token_text

Kind = Literal["logit", "log_prob", "difference", "feature"]


@dataclass(frozen=True)
class Quantity:
    """What is explained: something about the next token at a position, or a feature's activation there.

    | kind | value at the position |
    |---|---|
    | `logit` | the mean logit of `tokens` |
    | `log_prob` | the log-probability that the next token is one of `tokens` |
    | `difference` | the mean logit of `tokens` less that of `against` |
    | `feature` | `relu(pre-activation)` of a feature: its activation, where it is active |

    Attributes:
        kind: one of these.
        tokens, against: token ids.
        layer, feature: which feature.
        position: of the token behind which the next one is predicted, or at which the feature is active; negative ones
            count from the end.

    Raises:
        InputError: tokens or a feature that the kind needs are missing, or others are given.
    """

    kind: Kind
    tokens: tuple[int, ...] = ()
    against: tuple[int, ...] = ()
    layer: int | None = None
    feature: int | None = None
    position: int = -1

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(f"a quantity is one of {', '.join(get_args(Kind))}, not {self.kind!r}")
        of_feature = self.kind == "feature"
        if of_feature != (self.layer is not None and self.feature is not None) or of_feature == bool(self.tokens):
            raise InputError("a quantity is of tokens, or of a feature with its layer: give one of the two")
        if (self.kind == "difference") != bool(self.against):
            raise InputError("a difference of logits is of tokens against others: give both")
        if set(self.tokens) & set(self.against):
            raise InputError("the tokens and those they are set against are the same; name two different ones")

    @classmethod
    def logit(cls, *tokens: int, position: int = -1) -> Quantity:
        """The mean logit of tokens."""
        return cls("logit", tokens, position=position)

    @classmethod
    def log_prob(cls, *tokens: int, position: int = -1) -> Quantity:
        """The log-probability of any of the tokens."""
        return cls("log_prob", tokens, position=position)

    @classmethod
    def difference(cls, tokens: int | Sequence[int], against: int | Sequence[int], position: int = -1) -> Quantity:
        """The mean logit of tokens less that of others."""
        one, other = ((side,) if isinstance(side, int) else tuple(side) for side in (tokens, against))
        return cls("difference", one, other, position=position)

    @classmethod
    def activation(cls, layer: int, feature: int, position: int = -1) -> Quantity:
        """A feature's activation."""
        return cls("feature", layer=layer, feature=feature, position=position)

    def at(self, length: int) -> Quantity:
        """The same with its position counted from the start of a prompt of `length` tokens.

        Raises:
            InputError: the prompt has no such position.
        """
        place = self.position + length if self.position < 0 else self.position
        if not 0 <= place < length:
            raise InputError(
                f"position {self.position} does not exist: the prompt has {length} tokens, positions 0 to {length - 1},"
                f" or -{length} to -1 from the end"
            )
        return replace(self, position=place)

    def check(self, scope: Scope) -> None:
        """Refuse tokens and features that the scope does not have.

        Raises:
            InputError: a token outside the vocabulary, or a feature outside the dictionary.
            NotFoundError: a layer without an SAE.
        """
        words = len(scope.tokenizer)
        for token in (*self.tokens, *self.against):
            check_count("a token's id", token, 0, words - 1)
        if self.layer is not None:
            (layer,) = scope.check_layers([self.layer])
            check_count("a feature", self.feature, 0, scope.saes[layer].d_sae - 1)

    def of_logits(self, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, " batch"]:
        """The value of each row, from its logits at the position."""
        logits = logits.float()
        if self.kind == "log_prob":
            return logits.log_softmax(-1)[:, list(self.tokens)].logsumexp(-1)
        value = logits[:, list(self.tokens)].mean(-1)
        return value - logits[:, list(self.against)].mean(-1) if self.against else value

    def of_residual(self, scope: Scope, h: Float[Tensor, "batch d_model"]) -> Float[Tensor, " batch"]:
        """The value of each row, for a feature, from the stream that its SAE reads."""
        assert self.layer is not None, "of a feature"
        assert self.feature is not None, "of a feature"
        return scope.saes[self.layer].pre_acts(h, [self.feature])[:, 0].relu()

    def name(self, tokenizer: Any) -> str:
        """In words, such as `logit of " Paris" less " London"`."""
        if self.kind == "feature":
            return f"activation of {self.layer}/{self.feature}"
        said, other = (
            " or ".join(repr(token_text(tokenizer, token)) for token in side) for side in (self.tokens, self.against)
        )
        if self.kind == "difference":
            return f"logit of {said} less {other}"
        return f"{'log-probability' if self.kind == 'log_prob' else 'logit'} of {said}"


def one_token(scope: Scope, text: str) -> int:
    """The id of a text that is one token of the model, as it is typed, with its space.

    Raises:
        InputError: the text is empty, no token of the vocabulary, or several.
    """
    tokenizer = scope.tokenizer
    ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return ids[0]
    if not text or not ids or tokenizer.unk_token_id in ids:
        raise InputError(f"{text!r} is not in the vocabulary of {scope.name}; name a token, such as ' the'")
    pieces = " ".join(repr(token_text(tokenizer, i)) for i in ids[:8])
    raise InputError(
        f"{text!r} is {len(ids)} tokens to this model ({pieces}); name one token, such as"
        f" {token_text(tokenizer, ids[0])!r}"
    )


def next_logits(scope: Scope, ids: Sequence[int]) -> Float[Tensor, " vocab"]:
    """The logits of the token behind a prompt, of the tokens that the tokenizer has."""
    with torch.no_grad():
        place = input_device(scope.model)
        logits = last_logits(scope.model, input_ids=torch.tensor([list(ids)], device=place))[0]
    return logits[: len(scope.tokenizer)]


def most_likely(logits: Float[Tensor, " vocab"], n: int) -> list[tuple[int, float]]:
    """The `n` most likely next tokens with their probabilities."""
    best = torch.softmax(logits.float(), -1).topk(n)
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
