"""A student of a rule's labels: held out, compared with the rule, and both with the truth."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_scope.analysis import as_truth, distil
from qwen_scope.errors import InputError
from qwen_scope.text import Document

TEXTS = [f"the {word} number {i}" for i in range(20) for word in ("train", "river")]
LABELS = ["train" in text for text in TEXTS]


def test_it_is_measured_on_a_fifth_that_taught_nothing() -> None:
    truth = [label if i % 4 else not label for i, label in enumerate(LABELS)]
    made, result = distil("trains", TEXTS, LABELS, truth, seed=3)
    held = np.sort(np.random.default_rng(3).permutation(40)[:8])
    scores = made.scores([TEXTS[i] for i in held]) > 0
    assert result.data["held_out"] == 8
    assert result.data["agreement"] == np.mean(scores == np.array(LABELS)[held])
    right = np.array(truth)[held]
    both = int((np.array(LABELS)[held] & right).sum())
    f1 = 2 * both / (np.array(LABELS)[held].sum() + right.sum())
    assert result.data["results"]["rule, truth"]["f1"]["estimate"] == pytest.approx(f1)
    assert "the student agrees with the rule on" in result.notes[0]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="40 texts and 39 labels"):
        distil("x", TEXTS, LABELS[1:])
    assert as_truth(Document("a", {"east": "1"}), "east") is True
    with pytest.raises(InputError, match="has 'maybe' in 'east', not true or false"):
        as_truth(Document("a", {"east": "maybe"}), "east")
