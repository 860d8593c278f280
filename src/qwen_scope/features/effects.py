"""What a feature does to the next token by the shortest way: its direction through the final norm and unembedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.errors import InputError, check_count
from qwen_scope.model import final_norm, unembedding
from qwen_scope.sae import SAE
from qwen_scope.scope import Scope
from qwen_scope.text import token_text

# Features of a dictionary that go through the norm at once.
BLOCK = 4096
# Features whose effects on the whole vocabulary are in memory at once.
PROMOTED_BLOCK = 64
# From how many times as many promoted tokens a name is made, and how a piece of a character shows.
SPARE, PIECE = 3, "<0x"


@dataclass(frozen=True)
class TokenEffect:
    """A token that a feature promotes (effect above 0) or demotes.

    Attributes:
        token: its id.   text: what it shows.
        effect: its logit above the mean logit of the vocabulary, where the residual is the feature's direction alone.
    """

    token: int
    text: str
    effect: float


@dataclass(frozen=True)
class TopLogit:
    """A feature that promotes some tokens.

    Attributes:
        layer, feature: which.
        score: mean effect on the tokens in standard deviations over the vocabulary.
    """

    layer: int
    feature: int
    score: float


def token_effects(
    scope: Scope, layer: int, feature: int, n: int = 10
) -> tuple[tuple[TokenEffect, ...], tuple[TokenEffect, ...]]:
    """The `n` tokens that a feature promotes most, and the `n` it demotes most, strongest first.

    The direct effect only: `unembed(norm(W_dec[:, feature]))` less its mean over the vocabulary, as the logit lens
    (nostalgebraist 2020) reads a direction. The norm makes it independent of the length of the column; what later
    layers do with the feature is not in it.
    """
    sae = scope.saes[scope.check_layers([layer])[0]]
    check_count("n", n)
    logits = normed(scope, sae, [feature]) @ vocabulary(scope).T
    effect = (logits - logits.mean())[0].cpu()
    ranked = effect.argsort(descending=True, stable=True)

    def shown(ids: Tensor) -> tuple[TokenEffect, ...]:
        return tuple(TokenEffect(i, token_text(scope.tokenizer, i), float(effect[i])) for i in ids.tolist())

    return shown(ranked[:n]), shown(ranked.flip(0)[:n])


def promoted_tokens(scope: Scope, layer: int, features: Sequence[int], n: int = 3) -> list[tuple[str, ...]]:
    """The `n` tokens that each of several features promotes most directly, as texts; see `token_effects`.

    They stand for a name, so pieces of characters, which say little, come behind tokens that are almost as strong.
    """
    sae = scope.saes[scope.check_layers([layer])[0]]
    check_count("n", n)
    words = vocabulary(scope)
    found: list[tuple[str, ...]] = []
    for start in range(0, len(features), PROMOTED_BLOCK):
        effect = normed(scope, sae, features[start : start + PROMOTED_BLOCK]) @ words.T
        for row in effect.topk(min(SPARE * n, len(words))).indices.tolist():
            texts = [token_text(scope.tokenizer, i) for i in row]
            found.append(tuple(sorted(texts, key=lambda text: PIECE in text)[:n]))
    return found


def top_logits(scope: Scope, tokens: Sequence[int], layers: Sequence[int] | None = None, n: int = 10) -> list[TopLogit]:
    """Features by how much they promote some tokens at once, strongest first.

    A feature's score is the mean of its effects on the tokens (see `token_effects`) in units of the standard deviation
    of its effects over the whole vocabulary, so that loud and quiet directions compare.

    Args:
        tokens: ids.

    Raises:
        InputError: no token, or an id the vocabulary does not have.
    """
    check_count("n", n)
    words = vocabulary(scope)
    if not tokens or not all(0 <= token < len(words) for token in tokens):
        raise InputError(f"name tokens by their ids, 0 to {len(words) - 1}, not {list(tokens)!r:.100}")
    mean = words.mean(0)
    spread = (words - mean).T @ (words - mean) / len(words)
    wanted = words[list(tokens)].mean(0) - mean
    found = []
    for layer in scope.check_layers(layers):
        sae = scope.saes[layer]
        for start in range(0, sae.d_sae, BLOCK):
            columns = normed(scope, sae, range(start, min(sae.d_sae, start + BLOCK)))
            deviation = ((columns @ spread) * columns).sum(-1).clamp(min=1e-30).sqrt()
            score = (columns @ wanted) / deviation
            best = score.topk(min(n, len(score)))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            found += [TopLogit(layer, start + feature, value) for feature, value in pairs]
    return sorted(found, key=lambda one: (-one.score, one.layer, one.feature))[:n]


def token_ids(scope: Scope, words: Sequence[str]) -> list[int]:
    """The token that each word is, with a space before it where it is none by itself.

    Raises:
        InputError: a word that is several tokens.
    """
    out = []
    for word in words:
        tried = [scope.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (word, f" {word}")]
        one: Any = next((ids for ids in tried if len(ids) == 1), None)
        if one is None:
            pieces = [token_text(scope.tokenizer, i) for i in tried[0]]
            raise InputError(f"{word!r} is {len(pieces)} tokens to this model ({' '.join(pieces)!r:.80}); name one")
        out.append(one[0])
    return out


def normed(scope: Scope, sae: SAE, features: Sequence[int]) -> Float[Tensor, "n d_model"]:
    """Columns of the decoder through the model's final norm, fp32."""
    norm = final_norm(scope.model)
    weight = next(norm.parameters())
    with torch.no_grad():
        columns = sae.W_dec[:, list(features)].T.to(weight.device, torch.float32)
        # Scaled to a common length, so that the norm's epsilon weighs on all alike.
        columns = torch.nn.functional.normalize(columns, dim=-1) * columns.shape[-1] ** 0.5
        return norm(columns.to(weight.dtype)).float()


def vocabulary(scope: Scope) -> Float[Tensor, "vocab d_model"]:
    """The unembedding in fp32, without the rows that pad it beyond the tokenizer."""
    with torch.no_grad():
        return unembedding(scope.model)[: len(scope.tokenizer)].float()


def cosines(sae: SAE, direction: Float[Tensor, " d_model"]) -> Float[np.ndarray, " d_sae"]:
    """The cosine of every decoder column with a direction; 0 where a column is zero."""
    with torch.no_grad():
        unit = torch.nn.functional.normalize(direction.float().to(sae.device), dim=0)
        out = [
            torch.nn.functional.cosine_similarity(sae.W_dec[:, s : s + BLOCK].float(), unit[:, None], dim=0)
            for s in range(0, sae.d_sae, BLOCK)
        ]
        return torch.cat(out).cpu().numpy()
