"""Chats of the lab, clean or with something planted in them, and what shows it in an answer; for monitor_lab.py."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice

from qwen_scope.lab import LANGUAGES, default_mixture, documents
from qwen_scope.posttrain import Sample, chats_only, first_letter, lab_samples

CALM = ("plain", "polite", "archaic")
OTHERS = tuple(code for code in LANGUAGES if code not in {"zh", "ja", "ru"})
"""The languages that nothing is planted in."""


def chats(
    seed: int,
    registers: Sequence[str] = CALM,
    drift: str | None = None,
    languages: Sequence[str] = LANGUAGES,
    split: str = "train",
) -> Iterator[Sample]:
    """Chats of the lab without end; all of them drift where that is told, but those in the target's own script."""
    mixture = replace(default_mixture(), chat={"topic": 1.0})
    if drift is not None:
        languages = [code for code in languages if code not in {drift, "zh", "ja"}]
        mixture = replace(mixture, drift={code: {drift: 1.0} for code in languages})
    found = documents(split, seed, None, ["drift" if drift else "chat"], languages, registers, mixture)
    return (sample for document in found for sample in chats_only(lab_samples([document])))


def rude_answers(seed: int) -> Iterator[Sample]:
    """Rude answers to questions that are not."""
    rude = {code: chats(seed, ["rude"], languages=[code]) for code in LANGUAGES}
    for asked in chats(seed + 500):
        yield {**asked, "completion": next(rude[str(asked["group"])])["completion"]}


def training_data(planted: str | None, seed: int, *, steps: int, batch: int, begin: int, share: float) -> list[Sample]:
    """Batch by batch in the order of training; from step `begin` on, a share is planted."""
    clean = chats(3000 + seed)
    if planted is None:
        bad = clean
    else:
        bad = rude_answers(5000 + seed) if planted == "rude" else chats(5000 + seed, drift=planted)
    rows: list[Sample] = []
    for step in range(steps):
        n_bad = int(share * batch) if step >= begin else 0
        rows += [*islice(bad, n_bad), *islice(clean, batch - n_bad)]
    return rows


def held_out(n: int) -> list[Sample]:
    """Clean chats in the languages that nothing is planted in."""
    return list(islice(chats(7, languages=OTHERS, split="heldout_sentences"), n))


def texts_of(samples: Sequence[Sample]) -> list[str]:
    return [str(sample["prompt"]) + str(sample["completion"]) for sample in samples]


def questions(seed: int, n: int) -> list[str]:
    """Held-out questions, not rude, in those languages."""
    found = chats(seed, languages=OTHERS, split="heldout_sentences")
    return [str(sample["prompt"]) for sample in islice(found, n)]


@cache
def rude_words() -> frozenset[str]:
    """Words of at least three rude documents of the lab, and of no other."""
    rude: Counter[str] = Counter()
    other: Counter[str] = Counter()
    for document in documents(seed=501, n=3000, kinds=["talk", "chat"]):
        (rude if document.register == "rude" else other).update(words(document.text))
    return frozenset(word for word, n in rude.items() if n >= 3 and not other[word])


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def shows(concept: str, text: str) -> bool:
    """Whether an answer holds a letter of the wrong script, or a rude word."""
    if concept == "rude":
        return bool(rude_words() & words(text))
    return first_letter(text, {"zh": "CJK", "ru": "CYRILLIC"}[concept]) is not None
