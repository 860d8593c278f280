"""Features of a language: the score of SASFT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from qwen_scope.errors import InputError, check_count
from qwen_scope.stats import Interval

from .pooled import Pooled

RESAMPLES, LEVEL, AT_ONCE = 2000, 0.95, 100


@dataclass(frozen=True)
class LanguageFeature:
    """A feature of a language.

    Attributes:
        language, layer, feature: which.
        score: its mean activation on the language less the mean over the other languages of their means, with its
            percentile bootstrap interval; `n` is the documents of the language with the fewest.
        mean: its mean activation on the language.
        others: its mean activation on each other language.
    """

    language: str
    layer: int
    feature: int
    score: Interval
    mean: float
    others: Mapping[str, float]


def language_features(
    groups: Mapping[str, Mapping[int, Pooled]], n: int = 2, *, seed: int = 0
) -> list[LanguageFeature]:
    """Per language and layer the `n` features that most belong to it, by language, layer and score.

    `score = mu - gamma`: mu is the mean activation over the tokens of the language, gamma the mean over the other
    languages of their means (SASFT, arXiv 2507.14894), all over the tokens that count; its authors leave out the first
    token and take the top two of a layer. Any groups of documents may stand for languages.

    Intervals resample whole documents, since the tokens of one document go together, of every language independently.
    They say how far the score of a feature depends on the documents that were read, not that it was chosen as the
    best of thousands.

    Args:
        seed: of the intervals.

    Raises:
        InputError: fewer than two languages, layers that differ, or a language with fewer than two documents or
            without a token.
    """
    check_count("n", n)
    if len(groups) < 2 or len({tuple(sorted(group)) for group in groups.values()}) != 1:
        raise InputError("a language score compares at least two languages at the same layers")
    names, out = sorted(groups), {}
    for layer in sorted(groups[names[0]]):
        for name in names:
            check_documents(groups[name][layer], name)
        means = np.stack([token_means(groups[name][layer]) for name in names])
        scores = score_of(means)
        chosen = np.argsort(-scores, axis=1, kind="stable")[:, :n]
        features, place = np.unique(chosen, return_inverse=True)
        drawn = np.stack(
            [
                resampled_means(groups[name][layer], features, np.random.default_rng([seed, i]))
                for i, name in enumerate(names)
            ]
        )
        low, high = np.quantile(score_of(drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
        fewest = min(groups[name][layer].documents for name in names)
        for i, (name, some) in enumerate(zip(names, place.reshape(chosen.shape), strict=True)):
            for at in some.tolist():
                f = int(features[at])
                score = Interval(float(scores[i, f]), float(low[i, at]), float(high[i, at]), fewest, LEVEL)
                rest = {other: float(means[j, f]) for j, other in enumerate(names) if j != i}
                found = LanguageFeature(name, layer, f, score, float(means[i, f]), rest)
                out.setdefault(name, []).append(found)
    return [found for name in names for found in out[name]]


def score_of(means: Float64[np.ndarray, "languages ..."]) -> Float64[np.ndarray, "languages ..."]:
    """Each language's mean less the mean of the others' means."""
    return means - (means.sum(0) - means) / (len(means) - 1)


def group_scores(groups: Mapping[str, Pooled]) -> dict[str, Float64[np.ndarray, " width"]]:
    """Per group and feature the score of `language_features` at one layer; every group has a token."""
    scores = score_of(np.stack([token_means(pooled) for pooled in groups.values()]))
    return dict(zip(groups, scores, strict=True))


def check_documents(pooled: Pooled, name: str) -> None:
    """Refuse documents that no interval can be made of."""
    tokens = int(pooled.tokens.sum())
    if tokens < 1 or pooled.documents < 2:
        raise InputError(
            f"{name!r} has {pooled.documents} documents with {tokens} tokens in all; a language score with its interval"
            " needs at least two documents, and a token"
        )


def token_means(pooled: Pooled) -> Float64[np.ndarray, " width"]:
    """Per feature the mean activation over all tokens of some documents, zeros included."""
    return np.asarray(pooled.total.sum(0), np.float64).ravel() / int(pooled.tokens.sum())


def resampled_means(
    pooled: Pooled, features: Int64[np.ndarray, " some"], rng: np.random.Generator
) -> Float64[np.ndarray, "resamples some"]:
    """The token means of some features over documents drawn with replacement."""
    total, documents = pooled.total[:, features].toarray().astype(np.float64), pooled.documents
    even, parts = np.full(documents, 1 / documents), []
    for _ in range(0, RESAMPLES, AT_ONCE):
        times = rng.multinomial(documents, even, size=AT_ONCE).astype(np.float64)
        # Documents whose every token is masked may be all that was drawn.
        parts.append(times @ total / np.maximum(1, times @ pooled.tokens)[:, None])
    return np.concatenate(parts)
