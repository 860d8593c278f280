"""`material`: the contexts of a feature that a name is made from, and those that test it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen_scope.errors import InputError
from qwen_scope.store import Context, FeatureStore

from .label_options import FEWEST, LabelOptions

# A context has 32 tokens, as delphi's have.
BEFORE, AFTER = 20, 11


@dataclass(frozen=True)
class Material:
    """Contexts of one feature: to make a name from, and, from other documents, to test it with.

    Attributes:
        examples: where it fires.   firing: held out, where it fires.   silent: where it does not.
        marked: the silent contexts with as many random tokens marked as fire in a firing one.
        contrast: where it does not fire, of documents that test nothing: to make a name with.
        promotes: the tokens that it makes likely next, where a lens or a model says.
    """

    layer: int
    feature: int
    examples: tuple[Context, ...]
    firing: tuple[Context, ...]
    silent: tuple[Context, ...]
    marked: tuple[frozenset[int], ...]
    contrast: tuple[Context, ...] = ()
    promotes: tuple[str, ...] = ()


def material(store: FeatureStore, layer: int, feature: int, options: LabelOptions | None = None) -> Material:
    """Draw the contexts of a feature; no document is used both to make a name and to test it.

    Raises:
        InputError: it fires in too few documents, or in too many to find a place where it is silent.
    """
    o = options or LabelOptions()
    wide = {"before": BEFORE, "after": AFTER}
    top = store.contexts(layer, feature, o.examples // 2, per_document=True, **wide)  # pyright: ignore[reportArgumentType]
    drawn = store.contexts(layer, feature, 6 * (o.examples + o.tests), how="quantiles", seed=o.seed, **wide)  # pyright: ignore[reportArgumentType]
    rng = np.random.default_rng((o.seed, layer, feature))
    documents = rng.permutation(sorted({context.document for context in drawn} - {context.document for context in top}))
    # Half the documents beyond the strongest make the name, half test it; one context of each.
    first = dict.fromkeys(documents)
    for i in rng.permutation(len(drawn)):
        if drawn[i].document in first and first[drawn[i].document] is None:
            first[drawn[i].document] = drawn[i]
    others = [context for context in first.values() if context is not None]
    cut = min(o.examples - len(top), len(others) // 2)
    firing = others[cut : cut + o.tests]
    silent = store.silent(layer, feature, o.tests, seed=o.seed, **wide)
    used = {context.document for context in (*top, *others[:cut])}
    silent = [context for context in silent if context.document not in used] or silent
    if min(len(firing), len(silent)) < FEWEST:
        raise InputError(
            f"layer {layer}, feature {feature} has {len(firing)} contexts left to test a name where it fires and"
            f" {len(silent)} where it does not; {FEWEST} are the least"
        )
    counts = [sum(value > 0 for value in context.values) for context in firing]
    marked = tuple(
        frozenset(rng.choice(len(c.tokens), min(len(c.tokens), int(rng.choice(counts))), replace=False).tolist())
        for c in silent
    )
    tested = {context.document for context in (*firing, *silent)}
    others_silent = store.silent(layer, feature, 3 * o.tests, seed=o.seed + 1, **wide)
    contrast = [context for context in others_silent if context.document not in tested]
    made = (*top, *others[:cut])
    return Material(layer, feature, made, tuple(firing), tuple(silent), marked, tuple(contrast))
