"""`find`: which single features tell two sets of documents apart, and which of them to believe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from jaxtyping import Int64

from qwen_scope.errors import InputError
from qwen_scope.report import HasFrames, Progress, Table
from qwen_scope.scope import Layers, Scope, Texts, as_texts
from qwen_scope.stats import Interval, benjamini_hochberg, difference, resample
from qwen_scope.store import FeatureStore
from qwen_scope.text import Chat

from .options import FindOptions
from .pooled import Pooled, added, pool_store, pool_texts
from .scores import Scores, auroc_of, best, f1_of_calls, one_error_rule, score, validated_f1

FEWEST = 4
CANDIDATES = 50


@dataclass(frozen=True)
class Finding:
    """A feature that is stronger in the positive documents. Threshold and rank come from the discovery half, intervals
    and F1 from the other half, which chose nothing.

    Attributes:
        layer, feature: which.
        reduction: what stands for a document: the feature's `max` or its `mean` over the document's tokens.
        threshold: a document above it is called positive.
        f1: of that decision, held out.   f1_discovery: cross-validated inside the discovery half: what ranked it.
        auroc: held out.   difference: of mean activation, held out.
        rate: share of positive less share of negative documents in which it fires at all, held out.
        p: of the rank test over all documents.   q: p adjusted over every feature, layer and reduction that was looked
            at; at or below the level of the search it is a finding.
        significant: whether it is.
    """

    layer: int
    feature: int
    reduction: str
    threshold: float
    f1: Interval
    f1_discovery: float
    auroc: Interval
    difference: Interval
    rate: Interval
    p: float
    q: float
    significant: bool


@dataclass(frozen=True, repr=False)
class Findings(HasFrames):
    """The answer of a search.

    Attributes:
        found: best first.
        significant: how many features of all passed.
        tests: how many tests were made.   level: the false discovery rate.
        positives, negatives: documents.   held_out: how many of each were kept for measuring.
        by: what ranked.   seed: of the split and the intervals.
        left_out: by layer, how many tokens of the texts count, and how many do not for each of
            `qwen_scope.text.REASONS`; empty for documents of a store, which says it itself.
    """

    found: tuple[Finding, ...]
    significant: int
    tests: int
    level: float
    positives: int
    negatives: int
    held_out: tuple[int, int]
    by: str
    seed: int
    left_out: Mapping[int, Mapping[str, int]] = field(default_factory=dict)

    def sheet(self) -> Table:
        """A row per finding, an interval in three columns."""
        title = f"{self.significant} of {self.tests:,} tests pass a false discovery rate of {self.level:g}"
        return Table.of(title, self.found, [one.name for one in fields(Finding)])

    def __repr__(self) -> str:
        first = ", ".join(f"{one.layer}/{one.feature}" for one in self.found[:5])
        return f"Findings({self.significant} significant of {self.tests:,}; first {first or 'none'})"


def find(
    scope: Scope,
    positive: Texts,
    negative: Texts,
    layers: Layers = None,
    options: FindOptions | None = None,
    *,
    chat: Chat | None = None,
    progress: Progress | None = None,
) -> Findings:
    """Search for features that are stronger in the tokens of the positive texts that count; see `find_pooled`.

    Args:
        positive, negative: texts with the property and without it; with `chat` also conversations.
        layers: those to look at; None: all that have SAEs.
        options: how many, what ranks them, and the level.
        chat: render the texts with the chat template.
        progress: called with the stage, its share done (0 to 1) and a short text.

    Raises:
        InputError: a text in both sets, fewer than four in one, or an empty one.
        NotFoundError: a layer without an SAE.
    """
    positive, negative = as_texts(positive), as_texts(negative)
    known = [{one if isinstance(one, str) else repr(one) for one in some} for some in (positive, negative)]
    both = known[0] & known[1]
    if both:
        raise InputError(f"{len(both)} texts are in both sets, such as {min(both)!r:.60}")
    check_sizes(len(positive), len(negative))
    sides = []
    for name, some in (("with it", positive), ("without it", negative)):

        def tell(stage: str, share: float, text: str, name: str = name) -> None:
            if progress is not None:
                progress(name, share, text)

        sides.append(pool_texts(scope, some, layers, chat=chat, progress=tell))
    return find_pooled(sides[0], sides[1], options)


def find_in_store(
    store: FeatureStore,
    positive: Sequence[int] | Int64[np.ndarray, " n"] | None = None,
    negative: Sequence[int] | Int64[np.ndarray, " m"] | None = None,
    layers: Sequence[int] | None = None,
    options: FindOptions | None = None,
) -> Findings:
    """The same search over documents of a store, such as `store.where(...)` gives; by default against all others.

    With `options.phases` only tokens of those phases are compared. With `options.against` too, the documents' tokens of
    the one are compared with their tokens of the other: `FindOptions(phases=("thinking",), against=("answer",))` finds
    what fires while a model thinks and not while it answers.

    Args:
        positive: None for all documents, where phases are compared.

    Raises:
        InputError: a document in both sets, fewer than four in one, or nothing to compare.
        NotFoundError: a document or layer that the store does not have.
    """
    options = options or FindOptions()
    everywhere = np.arange(store.manifest.documents)
    if options.against is not None and options.phases is not None:
        if negative is not None:
            raise InputError("name either other documents or other phases to compare with")
        chosen = everywhere if positive is None else np.asarray(positive)
        one, other = (documents_of_phases(store, chosen, some) for some in (options.phases, options.against))
        check_sizes(len(one), len(other))
        return find_pooled(
            pool_store(store, one, layers, options.phases), pool_store(store, other, layers, options.against), options
        )
    if positive is None:
        raise InputError("name the documents with the property, or phases and what they are compared against")
    if negative is None:
        negative = np.setdiff1d(everywhere, positive)
    if len(both := np.intersect1d(positive, negative)):
        raise InputError(f"{len(both)} documents are in both sets, such as document {both[0]}")
    check_sizes(len(positive), len(negative))
    sides = [pool_store(store, some, layers, options.phases) for some in (positive, negative)]
    return find_pooled(sides[0], sides[1], options)


def documents_of_phases(
    store: FeatureStore, documents: Int64[np.ndarray, " n"], phases: Sequence[str]
) -> Int64[np.ndarray, " m"]:
    """Of some documents those with a token of one of the phases."""
    query = "SELECT DISTINCT document FROM spans WHERE list_contains(?::VARCHAR[], phase)"
    found = store.sql(query, [store.check_phases(phases)])["document"].to_numpy()
    return np.intersect1d(documents, found).astype(np.int64)


def find_pooled(
    positive: Mapping[int, Pooled], negative: Mapping[int, Pooled], options: FindOptions | None = None
) -> Findings:
    """Search the whole dictionary, at every layer given, for features that are stronger in the positive documents.

    One half of the documents of each set, drawn at random, ranks the features and sets the thresholds; every figure
    about a found feature is then measured on the other half. A Mann-Whitney test over all documents, adjusted over
    every feature, layer and reduction (Benjamini and Hochberg 1995), controls the expected share of false findings:
    among tens of thousands of features the best one looks good on any two sets. A false discovery rate of `level` also
    bounds, for sets that do not differ at all, the chance of reporting anything.

    Args:
        positive, negative: the documents, by layer (`pool_texts`, `pool_store`); the same layers in both.
        options: how many, what ranks them, and the level.

    Raises:
        InputError: fewer than four documents in a set, or layers that differ.
    """
    options = options or FindOptions()
    n, by, level, reductions, seed = options.n, options.by, options.level, options.reductions, options.seed
    if not positive or set(positive) != set(negative):
        raise InputError(f"both sets need the same layers, not {sorted(positive)} and {sorted(negative)}")
    sizes = [next(iter(some.values())).documents for some in (positive, negative)]
    check_sizes(*sizes)
    rng = np.random.default_rng(seed)
    halves = [np.split(rng.permutation(size), [size - size // 2]) for size in sizes]
    scores = [
        score(positive[layer], negative[layer], reduction, halves[0][0], halves[1][0])
        for layer in sorted(positive)
        for reduction in reductions
    ]
    tests = sum(positive[one.layer].width for one in scores)
    q = benjamini_hochberg(np.concatenate([one.p for one in scores]), tests)
    adjusted = np.split(q, np.cumsum([len(one.p) for one in scores])[:-1])
    believed = [(q <= level) & one.rises for one, q in zip(scores, adjusted, strict=True)]
    passed = {(one.layer, int(f)) for one, yes in zip(scores, believed, strict=True) for f in one.features[yes]}

    def values(which: int, at: int, half: int) -> list[np.ndarray]:
        one, sides = scores[which], zip((positive, negative), halves, strict=True)
        feature = [int(one.features[at])]
        return [some[one.layer].values(one.reduction, feature)[both[half], 0] for some, both in sides]

    chosen = best(scores, by, max(n, CANDIDATES))
    found = []
    if chosen:
        sides = [np.stack(side, axis=1) for side in zip(*(values(*one, 0) for one in chosen), strict=True)]
        f1, error = validated_f1(sides[0], sides[1], seed)
        separation = np.array([scores[which].separation[at] for which, at in chosen])
        order = one_error_rule(f1, error, separation) if by == "f1" else np.arange(len(chosen))
        for i in order[:n].tolist():
            (which, at), q_here = chosen[i], float(adjusted[chosen[i][0]][chosen[i][1]])
            found.append(measure(scores[which], at, values(which, at, 1), float(f1[i]), q_here, level, seed))
    held_out = len(halves[0][1]), len(halves[1][1])
    tallies = {layer: added([positive[layer].left_out, negative[layer].left_out]) for layer in sorted(positive)}
    left_out = {layer: tally for layer, tally in tallies.items() if tally}
    return Findings(tuple(found), len(passed), tests, level, sizes[0], sizes[1], held_out, by, seed, left_out)


def check_sizes(positive: int, negative: int) -> None:
    """Refuse sets that are too small to choose on one half and measure on the other; raises InputError."""
    if min(positive, negative) < FEWEST:
        raise InputError(f"a search needs at least {FEWEST} documents of each kind, not {positive} and {negative}")


def measure(
    one: Scores, at: int, held_out: Sequence[np.ndarray], validated: float, q: float, level: float, seed: int
) -> Finding:
    """What a feature does on the documents that did not choose it, where it has the values `held_out`."""
    feature, threshold = int(one.features[at]), float(one.threshold[at])
    a, b = (side.astype(np.float64) for side in held_out)
    return Finding(
        layer=one.layer,
        feature=feature,
        reduction=one.reduction,
        threshold=threshold,
        f1=resample((a > threshold) * 1.0, (b > threshold) * 1.0, f1_of_calls, seed=seed),
        f1_discovery=validated,
        auroc=resample(a, b, auroc_of, seed=seed),
        difference=difference(a, b, seed=seed),
        rate=difference((a > 0) * 1.0, (b > 0) * 1.0, seed=seed),
        p=float(one.p[at]),
        q=q,
        significant=bool(q <= level and one.rises[at]),
    )
