"""Does `find` put a feature first that holds on other documents? Every factor of the lab, 100 + 100 documents.

    .venv/bin/python bench/find_lab.py [--write] [--seed 73]

For each language, each register inside each language, code, arithmetic and chat, `find` gets 100 documents with the
factor and 100 without; half of them choose, the other half measures. The last columns take the first feature and its
threshold to other documents: sentences, templates and combinations the lab's model was never trained on. Then the
labels of a mixed set are shuffled, with fresh seeds, and nothing should be significant.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from sections import write_section

from qwen_scope import load_scope
from qwen_scope.features import Finding, Pooled, f1_of_calls, find, pool_texts
from qwen_scope.foundry import HELD_OUT, factors, gather, labelled
from qwen_scope.lab import Document, default_mixture

EACH, SHUFFLES, AIM, AIM_HARDEST, HARDEST = 100, 40, 0.95, 0.9, 3
SENTENCES = (7, 12)  # of a talk; of three sentences, one in eight carries no mark of its register at all
TITLE = "Finding the lab's factors"
MENDED = 2026  # the seed whose results led to the ranking of today


@dataclass(frozen=True)
class Line:
    """The first feature that `find` gives for a factor, and its F1 on text of other templates."""

    factor: str
    first: Finding
    elsewhere: float


def sides(docs: list[Document], label: Callable[[Document], bool | None]) -> tuple[np.ndarray, np.ndarray]:
    """The documents with the factor and those without, as numbers."""
    use, has = labelled(docs, label)
    return use[has], use[~has]


def some(pooled: dict[int, Pooled], rows: np.ndarray) -> dict[int, Pooled]:
    return {layer: one.rows(rows) for layer, one in pooled.items()}


def f1_elsewhere(pooled: dict[int, Pooled], first: Finding, positive: np.ndarray, negative: np.ndarray) -> float:
    """The F1 of the found feature and threshold on other documents."""
    called = pooled[first.layer].values(first.reduction, [first.feature])[:, 0] > first.threshold
    return float(f1_of_calls(called[positive], called[negative]))


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--model", default="lab", help="the lab, or the folder of another build")
    ask.add_argument("--sae", default=None)
    ask.add_argument(
        "--seed", type=int, default=MENDED, help="of documents, sets and halves; another gets a section of its own"
    )
    ask.add_argument("--write", action="store_true", help="write the table into docs/results.md")
    given = ask.parse_args()
    begun = time.monotonic()
    scope = load_scope(given.model, given.sae)
    mixture = replace(default_mixture(), sentences=SENTENCES)
    docs = gather("train", given.seed, EACH, mixture)
    other = [d for split in HELD_OUT for d in gather(split, given.seed + 1, EACH // 5, mixture)]
    pooled, pooled_other = (pool_texts(scope, [d.text for d in some_docs]) for some_docs in (docs, other))
    print(f"{len(docs)} + {len(other)} documents read in {time.monotonic() - begun:.0f} s", flush=True)
    rng = np.random.default_rng(given.seed)
    lines = []
    for factor, label in factors():
        positive, negative = (rng.choice(rows, EACH, replace=False) for rows in sides(docs, label))
        first = find(some(pooled, positive), some(pooled, negative), n=1, seed=given.seed).found[0]
        lines.append(Line(factor, first, f1_elsewhere(pooled_other, first, *sides(other, label))))
        print(row_of(lines[-1]), flush=True)
    reported = []
    for seed in range(SHUFFLES):
        drawn = np.random.default_rng((given.seed, seed)).choice(len(docs), 2 * EACH, replace=False)
        found = find(some(pooled, drawn[:EACH]), some(pooled, drawn[EACH:]), n=1, seed=seed)
        reported.append(found.significant)
    text = written(lines, reported, found.tests, found.level, given.seed)
    print(text)
    print(f"{time.monotonic() - begun:.0f} s")
    if given.write:
        write_section(TITLE if given.seed == MENDED else f"{TITLE}: seed {given.seed}", text)


def row_of(line: Line) -> str:
    one = line.first
    cells = (line.factor, one.layer, one.feature, f"{one.reduction} > {one.threshold:.3g}", f"{one.f1.estimate:.3f}")
    cells += (f"{one.f1.low:.3f} to {one.f1.high:.3f}", f"{one.auroc.estimate:.3f}", f"{line.elsewhere:.3f}")
    return "| " + " | ".join(map(str, cells)) + " |"


def written(lines: list[Line], reported: list[int], tests: int, level: float, seed: int) -> str:
    """The section of docs/results.md, without its title."""
    of = (
        "The ranking was mended after a run on this seed; a section below has a fresh one."
        if seed == MENDED
        else "Documents, sets and halves are other ones than those on which the ranking was mended."
    )
    ranked = sorted(lines, key=lambda line: line.first.f1.estimate)
    below = [line.factor for line in ranked[HARDEST:] if line.first.f1.estimate < AIM]
    hardest = [line for line in ranked[:HARDEST] if line.first.f1.estimate < AIM_HARDEST]
    quiet = sum(n == 0 for n in reported)
    met = sum(line.first.f1.estimate >= AIM for line in lines)
    held = "holds" if not below and not hardest else "does not hold"
    names = ", ".join(f"{line.factor} {line.first.f1.estimate:.3f}" for line in ranked if line.first.f1.estimate < AIM)
    apart = sum(line.elsewhere >= AIM for line in lines)
    said = f"Below {AIM}: {names}." if names else f"None is below {AIM}."
    return f"""
`bench/find_lab.py`: the feature that `find` ranks first, over all layers, from {EACH} documents with the factor
and {EACH} without. Half of them rank the features and set the threshold; F1 with its interval, and AUROC, are measured
on the other half. The last column is the F1 of the same feature and threshold on other text: sentences, templates
and combinations that the lab's model never saw in training. Talks have {SENTENCES[0]} to {SENTENCES[1]} sentences.
{of}

The aim was {AIM} for every factor and {AIM_HARDEST} for the hardest {HARDEST}; it {held}:
{met} of {len(lines)} reach {AIM}. {said}
On unseen sentences and templates {apart} reach it. With shuffled labels ({len(reported)} runs with fresh seeds,
{tests:,} tests each, false discovery rate {level:g}) {quiet} of {len(reported)} runs reported nothing.

| factor | layer | feature | is above | F1 held out | 95% interval | AUROC | F1, unseen templates |
| --- | --- | --- | --- | --- | --- | --- | --- |
""" + "".join(row_of(line) + "\n" for line in lines)


if __name__ == "__main__":
    main()
