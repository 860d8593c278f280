"""Which single feature tells a factor best: chosen on training documents, scored on held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from qwen_scope.features import best_f1, f1_of_calls
from qwen_scope.lab import LANGUAGES, REGISTERS, Document, Mixture, documents
from qwen_scope.scope import Scope

HELD_OUT = ("heldout_sentences", "heldout_templates", "heldout_combinations")

# Sorting every feature would take most of a build; the best detectors are among those that part the classes most.
TRIED = 128

# Per layer and reduction, one number per document and feature: `(documents, d_sae)`.
Pooled = Mapping[tuple[int, str], np.ndarray]


@dataclass(frozen=True)
class Detector:
    """The feature that alone tells a factor best.

    Attributes:
        factor: such as `zh` or `zh/rude`.
        layer, feature: which.
        reduction: what is compared with the threshold: the feature's `max` or `mean` over a document's tokens.
        threshold: a document is called positive above it.
        f1: on held-out documents.
        f1_train: on the documents it was chosen on.
        positives, negatives: held-out documents.
    """

    factor: str
    layer: int
    feature: int
    reduction: str
    threshold: float
    f1: float
    f1_train: float
    positives: int
    negatives: int


def detectors(scope: Scope, seed: int, per_factor: int) -> list[Detector]:
    """For each language, each register in each language, and each other kind: its best single feature."""
    training = gather("train", seed + 101, per_factor)
    held_out = [d for split in HELD_OUT for d in gather(split, seed + 102, max(1, per_factor * 2 // 5))]
    pooled_a, pooled_b = pooled(scope, training), pooled(scope, held_out)
    found = []
    for factor, label in factors():
        use_a, y_a = labelled(training, label)
        use_b, y_b = labelled(held_out, label)
        choices = [(*best_feature(values[use_a], y_a), *where) for where, values in pooled_a.items()]
        # Features of almost the same F1 are told apart by how far they keep the classes apart.
        score, _, feature, threshold, layer, reduction = max(choices, key=lambda c: (round(c[0], 2), c[1]))
        called = pooled_b[layer, reduction][use_b][:, feature] > threshold
        found.append(
            Detector(
                factor=factor,
                layer=layer,
                feature=feature,
                reduction=reduction,
                threshold=threshold,
                f1=float(f1_of_calls(called[y_b], called[~y_b])),
                f1_train=score,
                positives=int(y_b.sum()),
                negatives=int((~y_b).sum()),
            )
        )
    return found


def gather(split: str, seed: int, n: int, mixture: Mixture | None = None) -> list[Document]:
    """`n` documents for each language and register, and for each kind that has no language."""
    docs: list[Document] = []
    for language in LANGUAGES:
        for register in REGISTERS:
            only = {"kinds": ["talk"], "languages": [language], "registers": [register]}
            docs += documents(split=split, seed=seed, n=n, mixture=mixture, **only)
    for kind in ("arithmetic", "code", "prose", "chat"):
        docs += documents(split=split, seed=seed, n=n, kinds=[kind])
    return docs


def factors() -> Iterable[tuple[str, Callable[[Document], bool | None]]]:
    """Each factor and its label on a document: True, False, or None where the document does not count."""
    for language in LANGUAGES:
        # A chat may hold two languages; it says nothing about one.
        yield language, lambda d, lang=language: None if d.kind == "chat" else d.language == lang
        for register in REGISTERS:
            yield (
                f"{language}/{register}",
                lambda d, lang=language, r=register: (
                    d.register == r if d.kind == "talk" and d.language == lang else None
                ),
            )
    for kind in ("arithmetic", "code", "chat"):
        yield kind, lambda d, k=kind: d.kind == k


def labelled(docs: list[Document], label: Callable[[Document], bool | None]) -> tuple[np.ndarray, np.ndarray]:
    """Which documents count, as indices, and their labels."""
    labels = [label(d) for d in docs]
    use = [i for i, y in enumerate(labels) if y is not None]
    return np.array(use), np.array([bool(labels[i]) for i in use])


def pooled(scope: Scope, docs: list[Document]) -> Pooled:
    """The maximum and the mean of each feature over the tokens of each document."""
    out = {
        (layer, reduction): np.zeros((len(docs), scope.saes[layer].d_sae), dtype=np.float32)
        for layer in scope.layers
        for reduction in ("max", "mean")
    }
    for start in range(0, len(docs), 64):
        rows = slice(start, start + 64)
        seen = scope.features([d.text for d in docs[rows]], truncate=True)
        lengths = seen.mask.sum(-1, keepdim=True)
        for layer in scope.layers:
            indices, values = seen.acts[layer].indices.flatten(1).long(), seen.acts[layer].values.flatten(1)
            torch.from_numpy(out[layer, "max"][rows]).scatter_reduce_(1, indices, values, "amax")
            torch.from_numpy(out[layer, "mean"][rows]).scatter_add_(1, indices, values / lengths)
    return out


def best_feature(values: np.ndarray, y: np.ndarray) -> tuple[float, float, int, float]:
    """The feature and threshold with the best F1: `(f1, separation, feature, threshold)`.

    Separation is the difference of the class means in units of the standard deviation; it picks the features that are
    tried at all, and decides between those whose F1 is the same to two digits.
    """
    separation = (values[y].mean(0) - values[~y].mean(0)) / (values.std(0) + 1e-9)
    tried = np.argsort(-separation, kind="stable")[:TRIED]
    score, threshold = best_f1(values[y][:, tried], values[~y][:, tried])
    best = int(np.lexsort((separation[tried], score.round(2)))[-1])
    return float(score[best]), float(separation[tried[best]]), int(tried[best]), float(threshold[best])
