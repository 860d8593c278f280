"""Features of a language: the score of SASFT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from qwen_scope.errors import InputError

from .pooled import Pooled


@dataclass(frozen=True)
class LanguageFeature:
    """A feature of a language.

    Attributes:
        language, layer, feature: which.
        score: its mean activation on the language less the mean over the other languages of their means.
        mean: its mean activation on the language.
        others: its mean activation on each other language.
    """

    language: str
    layer: int
    feature: int
    score: float
    mean: float
    others: Mapping[str, float]


def language_features(groups: Mapping[str, Mapping[int, Pooled]], n: int = 2) -> list[LanguageFeature]:
    """Per language and layer the `n` features that most belong to it, by language, layer and score.

    `score = mu - gamma`: mu is the mean activation over the tokens of the language, gamma the mean over the other
    languages of their means (SASFT, arXiv 2507.14894); its authors leave out the first token (`skip_first` of
    `pool_texts`) and take the top two of a layer. Any groups of documents may stand for languages.

    Raises:
        InputError: fewer than two languages, layers that differ, or a language without a token.
    """
    if len(groups) < 2 or len({tuple(sorted(group)) for group in groups.values()}) != 1:
        raise InputError("a language score compares at least two languages at the same layers")
    out = []
    names = sorted(groups)
    means = {name: {layer: token_means(pooled, name) for layer, pooled in groups[name].items()} for name in names}
    for name in names:
        for layer in sorted(groups[name]):
            others = {other: means[other][layer] for other in names if other != name}
            score = means[name][layer] - np.mean(list(others.values()), axis=0)
            for feature in np.argsort(-score, kind="stable")[:n].tolist():
                rest = {other: float(mean[feature]) for other, mean in others.items()}
                mine = float(means[name][layer][feature])
                out.append(LanguageFeature(name, layer, feature, float(score[feature]), mine, rest))
    return out


def token_means(pooled: Pooled, name: str) -> Float64[np.ndarray, " width"]:
    """Per feature the mean activation over all tokens of some documents, zeros included."""
    tokens = int(pooled.tokens.sum())
    if tokens < 1:
        raise InputError(f"the documents of {name!r} have no token to average over")
    return np.asarray(pooled.total.sum(0), np.float64).ravel() / tokens
