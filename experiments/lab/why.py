"""Graphs of features on the lab: estimated against exact effects, ablation against matched features, faithfulness.

    python -m experiments.lab.why [--factors language,digit] [--set chosen-on] [--write]

A prompt's answer hangs on one known factor. The quantity is the logit of the answer's token less that of the token that
takes its place where the factor is another:

- language, register: a question in a chat, up to the answer; the same kind of question in another language, register.
- digit: a sum, up to its result; the first token of the result against the likeliest other number.
- topic: an answer up to the token that another topic would change most; the token it would become.

Criteria, fixed before the run that is reported (`--set reported`); the method is the one with the highest median
Pearson correlation on prompts of `--set chosen-on`, whose seed differs:

1. of the 50 features with the largest estimated effects, Pearson's correlation with exact ablation has a median of at
   least 0.95 over prompts;
2. ablating the 5 features with the largest positive effects lowers the quantity more than each of 20 sets of matched
   features (same layer, nearest in activation and firing rate) in at least 95% of prompts;
3. half the faithfulness (zero ablation, errors kept) is reached with at most a third of the features that ranking by
   activation needs (median over prompts).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.graphs import (
    MATCHED,
    STRONGEST,
    TOP,
    activations,
    agreement,
    estimates,
    half,
    matched,
    median_ratio,
    median_size,
)
from experiments.harness import At, Experiment, Row, main
from experiments.lab.bundled import lab
from experiments.sections import paragraph, table
from qwen_scope.circuits import Place, Quantity, most_likely, next_logits, read
from qwen_scope.lab import LANGUAGES, REGISTERS, chat_prompts, documents

METHODS = ("gradient", "ig", "relp")
CHOSEN = "gradient"
FACTORS = ("language", "register", "digit", "topic")
SEEDS = {"chosen-on": 4100, "reported": 7300, "fresh": 9500}
TITLE = "Why this token: estimated effects, ablation and faithfulness"


@dataclass(frozen=True)
class Sizes:
    """Prompts of each part, and how many of them integrated gradients are measured on too, which take the longest."""

    prompts: int = 10
    integrated: int = 2


def ids_of(text: str) -> list[int]:
    """The tokens of a text."""
    return lab().tokenizer(text)["input_ids"]


def likeliest(ids: Sequence[int]) -> int:
    """The next token that the model finds likeliest."""
    return most_likely(next_logits(lab(), ids), 1)[0][0]


def questions(seed: int, language: str, register: str) -> Iterator[list[int]]:
    """Questions in a chat, up to where the answer begins."""
    for one in chat_prompts(seed=seed, n=40, languages=[language], registers=[register]):
        yield ids_of(one.text)


def of_voice(seed: int, factor: str) -> Iterator[tuple[list[int], Quantity]]:
    """Questions whose answer begins otherwise in another language or register."""
    rng = np.random.default_rng(seed)
    while True:
        language, register = rng.choice(LANGUAGES), rng.choice(REGISTERS)
        levels = LANGUAGES if factor == "language" else REGISTERS
        other = rng.choice([one for one in levels if one not in (language, register)])
        changed = (other, register) if factor == "language" else (language, other)
        pick = int(rng.integers(2**31))
        ids, others = next(questions(pick, language, register)), next(questions(pick + 1, *changed))
        answer, instead = likeliest(ids), likeliest(others)
        if answer != instead:
            yield ids, Quantity.difference(answer, instead)


def of_digit(seed: int) -> Iterator[tuple[list[int], Quantity]]:
    """Sums that the model gets right, up to their result."""
    tokenizer = lab().tokenizer
    for one in documents(seed=seed, n=4000, kinds=["arithmetic"]):
        if one.factors["format"] != "tight":  # in the others a space comes first
            continue
        text = "\n".join(one.text.split("\n")[-3:])
        before = text[: len(text) - len(text.rpartition("=")[2].lstrip())].rstrip(" ")
        ids, whole = ids_of(before), ids_of(text)
        if whole[: len(ids)] != ids or len(whole) == len(ids) or likeliest(ids) != whole[len(ids)]:
            continue
        ranked = [word for word, _ in most_likely(next_logits(lab(), ids), 20)]
        numbers = [word for word in ranked[1:] if str(tokenizer.decode([word])).strip().isdigit()]
        if numbers:
            yield ids, Quantity.difference(ranked[0], numbers[0])


def of_topic(seed: int) -> Iterator[tuple[list[int], Quantity]]:
    """Answers up to the token that another topic would change most."""
    rng = np.random.default_rng(seed)
    while True:
        language, register = rng.choice(LANGUAGES), rng.choice(REGISTERS)
        ids, others = list(questions(int(rng.integers(2**31)), language, register))[:2]
        answer: list[int] = []
        best: tuple[float, int, int, int] | None = None
        for t in range(16):
            here = next_logits(lab(), [*ids, *answer]).float().log_softmax(-1)
            there = next_logits(lab(), [*others, *answer]).float().log_softmax(-1)
            word, instead = int(here.argmax()), int(there.argmax())
            change = float(here[word] - there[word])
            if word != instead and (best is None or change > best[0]):
                best = (change, t, word, instead)
            answer.append(word)
        if best is not None:
            yield [*ids, *answer[: best[1]]], Quantity.difference(best[2], best[3])


def prompts(factor: str, seed: int) -> Iterator[tuple[list[int], Quantity]]:
    """Prompts with what is asked about them."""
    if factor in ("language", "register"):
        return of_voice(seed, factor)
    return of_digit(seed) if factor == "digit" else of_topic(seed)


def of_prompt(ids: list[int], quantity: Quantity, seed: int, methods: Sequence[str]) -> dict[str, Any]:
    """Everything that is measured on one prompt."""
    reading = read(lab(), ids, quantity)
    out: dict[str, Any] = {"tokens": len(ids), "value": reading.value, "agreement": {}}
    ranked: dict[str, np.ndarray] = {}
    places: list[Place] = []
    for method in methods:
        places, estimated = estimates(reading, method)
        out["agreement"][method] = agreement(reading, places, estimated)
        ranked[method] = estimated
    chosen = ranked[CHOSEN]
    activation = activations(reading)
    out |= matched(reading, places, chosen, activation, seed)
    orders = {"effect": np.argsort(-np.abs(chosen)), "activation": np.argsort(-activation)}
    orders["random"] = np.random.default_rng(seed).permutation(len(places))
    out["half"] = {name: half(reading, places, order) for name, order in orders.items()}
    return out


def run(at: At[Sizes], factor: str, part: int) -> dict[str, Any]:
    """Some prompts of one factor."""
    seed = SEEDS[at.options["set"]] + 100 * part
    source = prompts(factor, seed + FACTORS.index(factor))
    first_order = tuple(method for method in METHODS if method != "ig")
    asked = [METHODS if n < at.sizes.integrated else first_order for n in range(at.sizes.prompts)]
    return {"prompts": [of_prompt(*next(source), seed=seed + n, methods=one) for n, one in enumerate(asked)]}


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """The section of docs/results.md."""
    cells, found = [], []
    groups: dict[str, list[Any]] = {}
    for row in rows:
        for name in (row["factor"], "all"):
            groups.setdefault(name, []).extend(row["prompts"])
    for factor in [*(name for name in groups if name != "all"), "all"]:
        ones = groups[factor]
        agreed = [[one["agreement"][m] for one in ones if m in one["agreement"]] for m in METHODS]
        pearson = [float(np.median([pair[0] for pair in pairs])) for pairs in agreed]
        spearman = [float(np.median([pair[1] for pair in pairs])) for pairs in agreed]
        beats = float(np.mean([one["beats"] for one in ones]))
        halves = [one["half"] for one in ones]
        ratio = median_ratio(halves, "effect", "activation")
        sizes = [median_size(halves, name) for name in ("effect", "activation", "random")]
        cells.append((factor, len(ones), *pearson, *spearman, f"{beats:.0%}", *sizes, ratio))
        found = [pearson[METHODS.index(CHOSEN)], beats, ratio]
    met = [found[0] >= 0.95, found[1] >= 0.95, found[2] <= 1 / 3]
    how = f"""`python -m experiments.lab.why --set {at.options["set"]} --write`: prompts of the lab whose answer hangs
        on a known factor; the quantity is the logit of the answer's token less that of the token in its place where the
        factor is another. Medians over prompts: Pearson and Spearman correlation of estimated and exact effects of the
        {TOP} features with the largest estimates (integrated gradients on {at.sizes.integrated} of every
        {at.sizes.prompts} prompts); the share of prompts in which ablating the {STRONGEST} strongest (method {CHOSEN},
        chosen on other prompts) lowers the quantity more than each of {MATCHED} matched sets; the number of features
        with which half the faithfulness is reached (zero ablation, errors kept) by size of effect, by activation and
        at random; and the median ratio of the first two."""
    names = ("Pearson of 0.95", "95% of prompts", "a third of the features")
    said = "; ".join(f"{name}: {'met' if one else 'not met'}" for name, one in zip(names, met, strict=True))
    columns = ("factor", "prompts", *(f"Pearson, {m}" for m in METHODS), *(f"Spearman, {m}" for m in METHODS),
               "strongest beat matched", "half by effect", "by activation", "at random", "ratio")  # fmt: skip
    return "\n\n".join([paragraph(how), table(columns, cells), paragraph(f"Criteria fixed before the run: {said}.")])


experiment = Experiment(
    title=TITLE,
    varies={"factor": FACTORS, "part": (0, 1, 2, 3, 4)},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"factor": ("language", "digit"), "part": (0,)},
    quick_sizes=Sizes(prompts=3, integrated=3),
    options={"set": {"choices": tuple(SEEDS), "default": "reported", "help": "which prompts; default: reported"}},
)

if __name__ == "__main__":
    main(experiment)
