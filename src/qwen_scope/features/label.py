"""`label`: names for features, each scored on contexts its author has not seen before it may appear."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Shaped

from qwen_scope.errors import InputError
from qwen_scope.report import Progress
from qwen_scope.stats import Interval, resample
from qwen_scope.store import FeatureStore

from .completion import BadAnswer
from .endpoint import BudgetSpent
from .judges import Informed, Judge
from .label_entry import Label
from .label_options import LabelOptions
from .material import Material, material
from .notes import Notes, make_label
from .threads import Threads


class Unanswered(InputError):
    """Too few questions were answered to give a name a score."""


def scored_label(given: Material, judge: Judge, name: str | None = None) -> Label:
    """A name with its two scores, as Paulo et al. (2024) define them in words of our own.

    Detection: from the name alone, does the feature fire in this context? Fuzzing: in this context, are the marked
    tokens the ones it fires on? Both are asked about held-out contexts where it fires, and others where it does not
    (there, tokens are marked at random). The score is balanced accuracy, the mean of the shares of right answers among
    firing and among silent contexts, with a bootstrap interval; 0.5 is chance. Questions without an answer don't count.

    Args:
        name: test this name instead of asking the judge for one.

    Raises:
        Unanswered: too few questions were answered to say anything.   BadAnswer: the judge gives no name.
    """
    text = name or (judge.name(given) if isinstance(judge, Informed) else judge.explain(given.examples))
    where = [frozenset(i for i, value in enumerate(context.values) if value > 0) for context in given.firing]
    rng = np.random.default_rng((given.layer, given.feature))
    asked = [(context, True) for context in given.firing] + [(context, False) for context in given.silent]
    pairs = list(zip(given.firing, where, strict=True)) + list(zip(given.silent, given.marked, strict=True))
    order = rng.permutation(len(asked)).tolist()
    truth = [asked[i][1] for i in order]
    detected = judge.detect(text, [asked[i][0] for i in order])
    fuzzed = judge.fuzz(text, [pairs[i] for i in order])
    return Label(text, balanced(detected, truth), balanced(fuzzed, truth), judge.source, judge.scorer)


def balanced(answers: Sequence[bool | None], truth: Sequence[bool]) -> Interval:
    """Balanced accuracy of the answers that were given; `n` is the smaller class.

    Raises:
        Unanswered: fewer than two answers in a class.
    """
    right = [
        np.array(
            [answer == y for answer, y in zip(answers, truth, strict=True) if y is side and answer is not None], float
        )
        for side in (True, False)
    ]
    if min(map(len, right)) < 2:
        raise Unanswered(
            f"the judge answered {len(right[0])} and {len(right[1])} questions of each kind; 2 are the least"
        )
    return resample(right[0], right[1], mean_of_means)


def label_features(
    store: FeatureStore,
    features: Sequence[tuple[int, int]],
    judge: Judge,
    options: LabelOptions | None = None,
    *,
    again: bool = False,
    promotes: Callable[[int, int], Sequence[str]] | None = None,
    progress: Progress | None = None,
) -> dict[tuple[int, int], Label | str]:
    """Label features and keep the labels with the store, each as soon as it is scored.

    A run that was stopped goes on: features that have a label of this judge are passed over. When the budget ends the
    labels made so far stay, and the rest is not there. A feature for which the judge gives no usable answer stays
    without a label, and the others go on.

    Args:
        features: (layer, feature) each.
        again: label also those that have one.
        promotes: by layer and feature, the tokens that it makes likely next, such as a lens reads them; a name may say
            so.
        progress: called with the stage, its share done (0 to 1) and a short text.

    Returns:
        per feature the label, or in words why there is none. Features left for want of budget are missing.

    Raises:
        BadAnswer: no answer of the judge was of use.   InputError, NotFoundError: it can't be asked; labels made so far
            are kept.
    """
    notes = Notes(store)
    out: dict[tuple[int, int], Label | str] = {}
    todo = []
    wanted = list(dict.fromkeys(features))
    for place in wanted:
        store.check_feature(*place)
        kept = [note.label for note in notes.of(*place, "label") if note.label.source == judge.source]
        if kept and not again:
            out[place] = kept[-1]
        else:
            todo.append(place)
    bad: list[BadAnswer] = []
    for place, found in _labelled(store, todo, judge, options or LabelOptions(), promotes):
        if isinstance(found, Label):
            notes.add(make_label(*place, store.layer(place[0]).fingerprint, found))
        elif isinstance(found, BadAnswer):
            bad.append(found)
        out[place] = str(found) if isinstance(found, BadAnswer) else found
        if progress is not None:
            progress("labels", len(out) / len(wanted), f"{len(out)} of {len(wanted)}")
    if bad and len(bad) == len(out):
        raise bad[0]
    return out


def _labelled(
    store: FeatureStore,
    places: Sequence[tuple[int, int]],
    judge: Judge,
    options: LabelOptions,
    promotes: Callable[[int, int], Sequence[str]] | None,
) -> Iterator[tuple[tuple[int, int], Label | BadAnswer | str]]:
    """Labels in order. The store is read here; only questions to the judge go to threads, some features at a time."""

    def one(given: Material) -> Label | BadAnswer | str | None:
        try:
            return scored_label(given, judge)
        except BudgetSpent:
            return None
        except BadAnswer as bad:
            return bad
        except Unanswered as error:
            return str(error)

    with Threads(judge.concurrency) as pool:
        for start in range(0, len(places), 2 * judge.concurrency):
            some = places[start : start + 2 * judge.concurrency]
            waiting = []
            for place in some:
                try:
                    given = material(store, *place, options)
                    if promotes is not None:
                        given = replace(given, promotes=tuple(promotes(*place)))
                    waiting.append((place, pool.submit(one, given)))
                except InputError as error:
                    yield place, str(error)
            for place, task in waiting:
                if (found := pool.result(task)) is not None:
                    yield place, found


def mean_of_means(a: Shaped[np.ndarray, ...], b: Shaped[np.ndarray, ...], axis: int = -1) -> np.ndarray:
    """Balanced accuracy: the mean of the shares of right answers of two classes."""
    return np.asarray((a.mean(axis) + b.mean(axis)) / 2)
