"""A small model of the bare text from the labels that a rule gave, measured beside the rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from qwen_scope.errors import InputError
from qwen_scope.stats import rates
from qwen_scope.text import Document

from .baselines import Student
from .result import Result
from .trial import rates_table

HELD_OUT = 5
"""One in so many documents is held out."""

TRUTHS = {True: True, False: False, "true": True, "false": False, "1": True, "0": False, "True": True, "False": False}


def distil(
    name: str, texts: Sequence[str], labels: Sequence[bool], truth: Sequence[bool] | None = None, *, seed: int = 0
) -> tuple[Student, Result]:
    """A student of the texts and labels, and how it does on a fifth of them that is held out.

    Args:
        name: of the rule that gave the labels.
        truth: the true labels, to measure rule and student against both.
        seed: of the fifth that is held out.

    Raises:
        InputError: as many texts as labels are needed, of both classes among those that teach.
    """
    if len({len(texts), len(labels), len(labels) if truth is None else len(truth)}) > 1:
        raise InputError(f"there are {len(texts)} texts and {len(labels)} labels; give one label per text")
    y = np.array(labels, dtype=bool)
    order = np.random.default_rng(seed).permutation(len(texts))
    held, kept = np.sort(order[: len(order) // HELD_OUT]), np.sort(order[len(order) // HELD_OUT :])
    made = Student.fit([texts[int(i)] for i in kept], y[kept], {"rule": name, "documents": len(kept)})
    scores = made.scores([texts[int(i)] for i in held])
    results = {"student, rule's labels": rates(scores > 0, y[held], scores)}
    if truth is not None:
        real = np.array(truth, dtype=bool)[held]
        results["rule, truth"] = rates(y[held], real)
        results["student, truth"] = rates(scores > 0, real, scores)
    agreement = float((y[held] == (scores > 0)).mean())
    data = {"documents": len(texts), "held_out": len(held), "agreement": agreement}
    data["results"] = {said: asdict(one) for said, one in results.items()}
    note = f"the student agrees with the rule on {agreement:.1%} of {len(held)} held-out documents"
    if truth is not None:
        lost = results["rule, truth"].f1.estimate - results["student, truth"].f1.estimate
        note += f"; against the truth its F1 is {'lower' if lost > 0 else 'higher'} by {abs(lost):.3f}"
        data["lost_f1"] = lost
    return made, Result(data, rates_table("On held-out documents", results), (), (note,))


def as_truth(document: Document, column: str) -> bool:
    """The true label of a document, from a column that holds true or false, or 1 or 0.

    Raises:
        InputError: it holds something else.
    """
    value = document.meta.get(column)
    if value not in TRUTHS:
        raise InputError(f"row {document.row} of {document.source} has {value!r} in {column!r}, not true or false")
    return TRUTHS[value]
