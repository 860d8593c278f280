"""The suites of a scoreboard: each reads something once, and measures every arm on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from qwen_scope.errors import InputError
from qwen_scope.model import HookPoint, LoadedModel
from qwen_scope.sae import SAE
from qwen_scope.text import Counted

from .absorb import EXAMPLES, WORDS, absorption, read_words, vocabulary
from .bags import Bags, read_bags
from .contrast import contrast
from .labelled import Labelled, LabelledData, halves
from .options import ScoreRun
from .perturb import OTHER, Probes, scr, spurious, tpp, train_probes
from .probing import Known, drawn, probe, read_split
from .steered import FEATURES, LENGTH, ROWS, TEXTS, Reading, read_rows, steering_loss

TOKENS = 128
"""Of a text that is read from its beginning, as SAEBench does."""
CONTRASTS = 10
"""Pairs of texts per dataset."""
FEWEST = 20
"""Texts of a class, or of a quadrant, that are worth a probe."""
LESS, NEITHER = frozenset({"absorbed share", "full absorption", "steering loss"}), frozenset({"main features"})


def better(figure: str) -> int:
    """Whether more (1) or less (-1) of a suite's figure is better; 0 where neither is."""
    return 0 if figure in NEITHER else -1 if figure in LESS else 1


@dataclass(frozen=True, eq=False)
class Inputs:
    """What suites read with.

    Attributes:
        point: where the SAE reads.   rows: the text that figures are measured on.   data: the labelled texts, if any.
        known: residuals of texts that probing has read.
    """

    run: ScoreRun
    loaded: LoadedModel
    point: HookPoint
    counted: Counted
    rows: Sequence[Tensor]
    data: LabelledData | None
    known: Known = field(default_factory=dict)

    @property
    def labelled(self) -> LabelledData:
        """The labelled texts, where a suite asks for them."""
        assert self.data is not None, "suites that read labelled texts have no items without them"
        return self.data

    def bags(self, texts: Sequence[str]) -> Bags:
        """Texts read from their beginning."""
        return read_bags(self.loaded, self.point, texts, self.counted, tokens=TOKENS, batch=self.run.batch_size)


@dataclass(frozen=True)
class Suite:
    """One kind of figures.

    Attributes:
        says: the heading of its table.
        items: what is read one after the other, such as datasets; the table has means over them.
        read: of an item what all arms are measured on; InputError where there is too little of it.
        measure: the figures of an SAE; the flag says that it is the one that is scored, not a control.
        texts: the texts of an item and of how many tokens each is read at most, for the cost beforehand.
    """

    says: str
    items: Callable[[ScoreRun, LabelledData | None], list[str]]
    read: Callable[[Inputs, str], Any]
    measure: Callable[[SAE, Any, bool], Mapping[str, float]]
    texts: Callable[[ScoreRun, LabelledData, str], tuple[Sequence[str], int]] | None = None


def _datasets(run: ScoreRun, data: LabelledData | None) -> list[str]:
    return list(run.datasets or data.names) if data else []


def _sets(run: ScoreRun, data: LabelledData | None) -> list[str]:
    return data.sets if data else []


def _pairs(run: ScoreRun, data: LabelledData | None) -> list[str]:
    return data.pairs if data else []


def _probing_texts(one: Labelled, rows: int) -> list[str]:
    """The texts of a dataset that probing reads."""
    return [one.texts[i] for part in drawn(one, rows) for i in part.tolist()]


def _read_split(given: Inputs, name: str) -> Any:
    data, run = given.labelled.read(name), given.run
    return name, read_split(given.loaded, given.point, data, rows=run.rows, batch=run.batch_size, known=given.known)


def _probed(sae: SAE, given: Any, own: bool) -> dict[str, float]:
    name, split = given
    one = probe(sae, split, name, baseline=own)
    found = {str(k): value for k, value in one.features.items()}
    return found if one.residual is None else {**found, "residual": one.residual}


def _parts(n: int) -> tuple[slice, slice]:
    """Five of seven texts to train on, the others to test on."""
    return slice(0, n * 5 // 7), slice(n * 5 // 7, n)


def _class_texts(run: ScoreRun, data: LabelledData, name: str) -> dict[str, tuple[str, ...]]:
    """As many texts of every class of a set."""
    found = data.classes(name)
    n = min(run.rows // 2, *map(len, found.values()))
    if n < FEWEST:
        raise InputError(f"{name} has {n} texts in its smallest class; {FEWEST} are the least")
    return {one: texts[:n] for one, texts in found.items()}


def _read_classes(given: Inputs, name: str) -> Probes:
    found = _class_texts(given.run, given.labelled, name)
    n = len(next(iter(found.values())))
    train, test = ({one: given.bags(texts[part]) for one, texts in found.items()} for part in _parts(n))
    return train_probes(train, test, None)


def _read_pair(given: Inputs, name: str) -> Probes:
    """Both attributes' texts; a text that is in several classes is read once."""
    found = given.labelled.crossed(name)
    q = min(len(found[1, 0]), len(found[0, 1]), len(found[1, 1]) // 2, len(found[0, 0]) // 2, given.run.rows // 6)
    if q < FEWEST:
        raise InputError(
            f"{name} has too few texts that have one attribute without the other: {q}, and {FEWEST} are the least"
        )
    bags = {which: given.bags(some[: (1 + (which[0] == which[1])) * q]) for which, some in found.items()}
    sides = []
    for train in (True, False):
        cut = {which: _parts(len(one))[not train] for which, one in bags.items()}
        places = {which: range(*cut[which].indices(len(one))) for which, one in bags.items()}
        chosen = spurious({which: [(which, i) for i in some] for which, some in places.items()})
        sides.append({one: gathered(bags, some) for one, some in chosen.items()})
    return train_probes(sides[0], sides[1], OTHER)


def gathered(bags: Mapping[tuple[int, int], Bags], places: Sequence[tuple[tuple[int, int], int]]) -> Bags:
    """Texts of several bags as one."""
    import torch

    starts = {which: torch.cumsum(one.lengths, 0) - one.lengths for which, one in bags.items()}
    parts = [bags[w].h[int(starts[w][i]) : int(starts[w][i] + bags[w].lengths[i])] for w, i in places]
    return Bags(torch.cat(parts), torch.tensor([len(part) for part in parts]))


def _contrasts(run: ScoreRun, data: LabelledData) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Per dataset as many texts of one class as of the other."""
    out = {}
    for name in _datasets(run, data):
        first, second = halves(data.read(name))
        n = min(CONTRASTS, len(first), len(second))
        if n:
            out[name] = (first[:n], second[:n])
    return out


def _read_contrasts(given: Inputs, _: str) -> dict[str, tuple[Bags, Bags]]:
    pairs = _contrasts(given.run, given.labelled)
    if len(pairs) < 2:
        raise InputError(f"{len(pairs)} datasets have texts of both classes; independence compares at least 2")
    return {name: (given.bags(a), given.bags(b)) for name, (a, b) in pairs.items()}


def _read_words(given: Inputs, _: str) -> Any:
    return read_words(given.loaded, given.point, vocabulary(given.loaded.tokenizer), given.run.batch_size)


def _read_rows(given: Inputs, _: str) -> Reading:
    return read_rows(given.loaded, given.point, given.rows, given.counted)


PROBES = "probes"
SUITES = {
    PROBES: Suite(
        "sparse probing: mean AUROC by number of features", _datasets, _read_split, _probed,
        lambda run, data, name: (_probing_texts(data.read(name), run.rows), 256),
    ),
    "tpp": Suite(
        "targeted probe perturbation by features ablated", _sets, _read_classes, lambda sae, given, _: tpp(sae, given),
        lambda run, data, name: ([t for some in _class_texts(run, data, name).values() for t in some], TOKENS),
    ),
    "scr": Suite(
        "spurious-correlation removal by features ablated", _pairs, _read_pair, lambda sae, given, _: scr(sae, given),
        lambda run, data, name: ([t for some in data.crossed(name).values() for t in some[: run.rows // 3]], TOKENS),
    ),
    "contrast": Suite(
        "CE-Bench's contrastive scores", lambda run, data: ["pairs"] if data else [], _read_contrasts,
        lambda sae, given, _: contrast(sae, given),
        lambda run, data, _: ([t for both in _contrasts(run, data).values() for side in both for t in side], TOKENS),
    ),
    "absorption": Suite(
        "absorption of first letters", lambda run, _: ["first letters"], _read_words,
        lambda sae, given, _: absorption(sae, given),
    ),
    "steering": Suite(
        "loss of steering, in nats per token", lambda run, _: ["held-out text"], _read_rows,
        lambda sae, given, _: steering_loss(sae, given),
    ),
}  # fmt: skip
"""In the order in which they are measured."""
PER_WORD = 7 * EXAMPLES + 6  # tokens of a prompt, about


def tokens_of(suite: str, run: ScoreRun, data: LabelledData | None, item: str, arms: int, known: set[str]) -> int:
    """About how many tokens an item takes: four characters are one token.

    Args:
        known: texts that probing has read before at the layer, and does not read again; those of the item are added.
    """
    if suite == "absorption":
        return WORDS * PER_WORD
    if suite == "steering":
        return 2 * ROWS * LENGTH + arms * FEATURES * 2 * TEXTS * LENGTH
    how = SUITES[suite].texts
    assert how is not None, "the others have none"
    assert data is not None, "a suite of labelled texts has items where there are some"
    try:
        texts, most = how(run, data, item)
    except InputError:
        return 0  # there is too little of it, which the scoreboard says
    if suite == PROBES:
        texts = [text for text in dict.fromkeys(texts) if text not in known]
        known.update(texts)
    return int(sum(np.minimum([len(text) // 4 + 1 for text in texts], most)))
