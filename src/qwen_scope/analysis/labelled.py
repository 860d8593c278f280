"""Labelled documents from `scope.firings`: fit a rule beside the usual classifiers, and predict with one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32

from qwen_scope.errors import InputError
from qwen_scope.store import Firings
from qwen_scope.text import Counted

from .classify import Labelled, joined
from .dataset import Dataset
from .options import FitOptions
from .result import Result
from .rule import Evidence, Rule
from .trial import try_rule

Vectors = Mapping[int, Float32[np.ndarray, "_ d_model"]]


@dataclass(frozen=True)
class Answer:
    """What a rule says of a document.

    Attributes:
        row: of the document in its source, from 1.
        label: whether it is positive.   score: how strongly, in units of each feature's scale.
        because: the features above their thresholds, the strongest first.
        tokens: what the token of each of them shows.
    """

    row: int
    label: bool
    score: float
    because: tuple[Evidence, ...]
    tokens: tuple[str, ...]


def datasets_of(firings: Firings, name: str | None = None) -> dict[int, Dataset]:
    """The documents at each layer, reduced by `max`."""
    ids = tuple(map(str, range(len(firings))))
    return {
        layer: Dataset.from_table(
            firings.table,
            name=name or firings.name,
            ids=ids,
            layer=layer,
            width=info.d_sae,
            sae=info.fingerprint,
            texts=firings.texts,
        )
        for layer, info in firings.layers.items()
    }


def labelled(positive: Firings, negative: Firings) -> tuple[Labelled, dict[int, np.ndarray]]:
    """Documents with a property and without it as one set, and their mean residuals by layer.

    Raises:
        InputError: they count other tokens.   MismatchError: other layers or SAEs.
    """
    for some in (positive, negative):
        if not len(some):
            raise InputError(f"no document of {some.name} has a token that counts at every layer")
    if said := positive.counted.difference(negative.counted, (positive.name, negative.name)):
        raise InputError(said)
    other = negative.name + "-negative" if negative.name == positive.name else negative.name
    with_it, without = datasets_of(positive), datasets_of(negative, other)
    layers = {layer: joined("seeds", [with_it[layer], without[layer]]) for layer in with_it}
    labels = np.array([True] * len(positive) + [False] * len(negative))
    vectors = {
        layer: np.concatenate([positive.residuals[layer], negative.residuals[layer]]) for layer in positive.layers
    }
    return Labelled(layers, labels), vectors


def fit(
    positive: Firings,
    negative: Firings,
    test: tuple[Firings, Firings] | None = None,
    options: FitOptions | None = None,
) -> tuple[Rule, Result]:
    """A rule of features that tells two sets of documents apart, tested beside the usual classifiers.

    All of them see the tokens that count, which the rule keeps.

    Args:
        test: held-out documents with and without the property; by default a third of the others.

    Raises:
        InputError: as `try_rule`, or sets that count other tokens.   MismatchError: other SAEs.
    """
    options = options or FitOptions()
    seeds, vectors = labelled(positive, negative)
    if test is not None:
        for some in test:
            if said := positive.counted.difference(some.counted, (positive.name, some.name)):
                raise InputError(said)
        held, held_vectors = labelled(*test)
    else:
        first, second = seeds.split(2 / 3, options.seed)
        held, held_vectors = seeds.take(second), {layer: x[second] for layer, x in vectors.items()}
        seeds, vectors = seeds.take(first), {layer: x[first] for layer, x in vectors.items()}
    rule, result = try_rule(
        seeds,
        held,
        vectors,
        held_vectors,
        top=options.top,
        weighted=options.weighted,
        several=options.several,
        fpr=options.fpr,
        name=options.name or positive.name,
        seed=options.seed,
    )
    rule = replace(rule, about={**rule.about, "counted": positive.counted.to_json()})
    return rule, replace(result, data={**result.data, "counted": positive.counted.to_json()})


def counted_by(rule: Rule) -> Counted:
    """`rule.counted`: which tokens counted when a rule was fitted; raises FormatError for a record that is none."""
    return rule.counted


def features_of(rule: Rule) -> dict[int, Sequence[int]]:
    """The features of a rule by layer: all that `predict` needs of `scope.firings`."""
    return {layer: sorted({f.feature for f in rule.features if f.layer == layer}) for layer in rule.layers}


def predict(rule: Rule, firings: Firings) -> list[Answer]:
    """What a rule says of documents.

    Raises:
        InputError: they count other tokens than the rule was fitted on: give `scope.firings` the rule's own with
            `ExtractOptions(counted=counted_by(rule))`.
        MismatchError: other SAEs.   NotFoundError: a layer is missing.
    """
    if said := counted_by(rule).difference(firings.counted, (f"the rule {rule.name!r}", firings.name)):
        raise InputError(f"{said}; read the documents with ExtractOptions(counted=counted_by(rule))")
    if not len(firings):
        return []
    found = datasets_of(firings)
    called, scores = rule.decide(found), rule.scores(found)
    out = []
    for i, row in enumerate(firings.rows):
        because = tuple(rule.trace(found, i)) if called[i] else ()
        shown = tuple(firings.tokens[i][one.position] for one in because)
        out.append(Answer(row, bool(called[i]), float(scores[i]), because, shown))
    return out
