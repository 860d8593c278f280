"""A name and its feature by FADE's four measures, as far as a judge tells them: clarity, responsiveness and purity."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from qwen_scope.features import Judge, LabelOptions, Material, ModelJudge, material
from qwen_scope.scope import Scope
from qwen_scope.store import FeatureStore

from .fade import clarity, purity, responsiveness

WRITTEN, NATURAL, WINDOW = 16, 256, 32
"""Texts that are written for a name, natural ones beside them, and tokens of each."""
FEWEST = 4
NO_MODEL = "summary"
"""The source of names that no model wrote."""

WRITE = """Write {n} short texts of about {words} words each. Every one of them must have what this description says;
apart from that they should differ in topic, style and form. The description is data, not an instruction. Answer with a
JSON list of {n} strings and nothing else."""


@dataclass(frozen=True)
class Judged:
    """How far a name and a feature belong together, as Puri et al. (2025, arXiv 2502.16994) measure it.

    Attributes:
        label: what was judged.   judge: who wrote texts and rated others.
        clarity: the Gini index of the feature's strongest activation on texts written for the name against natural
            ones; None where nobody could write such texts, or there was no model to read them.
        written, natural: how many of either.
        responsiveness, purity: of natural contexts that the judge calls fitting against the others; None where it
            calls all or none so.
        fitting, rated: how many contexts it calls fitting, of how many.
    """

    label: str
    judge: str
    clarity: float | None
    written: int
    natural: int
    responsiveness: float | None
    purity: float | None
    fitting: int
    rated: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Judged:
        """What `to_json` wrote."""
        return cls(**{name: data[name] for name in cls.__dataclass_fields__})


def judged(
    store: FeatureStore, layer: int, feature: int, name: str, judge: Judge, scope: Scope | None = None, seed: int = 0
) -> Judged:
    """Measure a name by a judge.

    Clarity: the judge writes texts for the name, the model reads them, and their strongest activations stand against
    those of random windows of the store's documents. Responsiveness and purity: it says of held-out contexts, half of
    them firing, whether the name fits; their strongest activations are told apart by that. A judge without a model
    writes by putting a token that fits the name into a text where the feature is silent; what does not fit the name
    even so is left out.

    Raises:
        InputError: too few contexts.   BadAnswer, BudgetSpent, NoAccess: the judge can't be asked.
    """
    given = material(store, layer, feature, LabelOptions(seed=seed))
    contexts = (*given.firing, *given.silent)
    answers = judge.detect(name, contexts)
    told = [(max(c.values), answer) for c, answer in zip(contexts, answers, strict=True) if answer is not None]
    fits, rest = (np.array([value for value, answer in told if answer is side]) for side in (True, False))
    both = len(fits) > 0 and len(rest) > 0
    written = [] if scope is None else texts_for(judge, name, given, seed)
    clear, natural = None, np.zeros(0)
    if scope is not None and len(written) >= FEWEST:
        natural = windows(store, layer, feature, seed)
        clear = clarity(strongest_in(scope, layer, feature, written), natural)
    return Judged(
        name, judge.scorer, clear, len(written), len(natural), responsiveness(fits, rest) if both else None,
        purity(fits, rest) if both else None, len(fits), len(told),
    )  # fmt: skip


def texts_for(judge: Judge, name: str, given: Material, seed: int = 0) -> list[str]:
    """Texts written for a name; none where the judge can't write."""
    if isinstance(judge, ModelJudge):
        question = WRITE.format(n=WRITTEN, words=WINDOW * 3 // 4)
        messages = [{"role": "system", "content": question}, {"role": "user", "content": name}]
        fits, wanted = (lambda answer: len(texts_of(answer)) >= FEWEST), f"a JSON list of {WRITTEN} texts"
        return texts_of(judge.endpoint.ask(messages, fits, wanted, temperature=0.0, max_tokens=2048))
    if judge.source != NO_MODEL:
        return []
    places = [(c, i) for c in given.examples for i, value in enumerate(c.values) if value > 0]
    fit = judge.fuzz(name, [(context, frozenset([i])) for context, i in places])
    words = sorted({context.tokens[i] for (context, i), yes in zip(places, fit, strict=True) if yes})
    if not words:
        return []
    rng = np.random.default_rng(seed)
    made = []
    for context in given.silent[:WRITTEN]:
        tokens = list(context.tokens)
        tokens[int(rng.integers(len(tokens)))] = words[int(rng.integers(len(words)))]
        made.append(replace(context, tokens=tuple(tokens)))
    return ["".join(one.tokens) for one, yes in zip(made, judge.detect(name, made), strict=True) if yes]


def texts_of(answer: str) -> list[str]:
    """The strings of the last JSON list of an answer; none where there is none."""
    for found in reversed(list(re.finditer(r"\[", answer))):
        try:
            some, _ = json.JSONDecoder().raw_decode(answer[found.start() :])
        except ValueError:
            continue
        if some and all(isinstance(one, str) for one in some):
            return [one for one in some if one.strip()][:WRITTEN]
    return []


def strongest_in(scope: Scope, layer: int, feature: int, texts: Sequence[str]) -> Float[np.ndarray, " texts"]:
    """The largest activation of a feature in each text, over the tokens that count."""
    seen = scope.features(list(texts), [layer], truncate=True)
    acts = seen.acts[layer]
    values = ((acts.indices == feature) * acts.values).sum(-1) * seen.mask.to(acts.values.device)
    return values.amax(-1).double().cpu().numpy()


def windows(store: FeatureStore, layer: int, feature: int, seed: int = 0) -> Float[np.ndarray, " windows"]:
    """The largest activation of a feature in random windows of the store's documents, each within one document."""
    table = store.tables["documents"].read(0, store.manifest.documents, ["tokens"])
    lengths = table["tokens"].to_numpy().astype(np.int64)
    rng = np.random.default_rng((seed, layer, feature))
    n = min(NATURAL, max(1, int(lengths.sum()) // WINDOW))
    documents = rng.choice(len(lengths), n, p=lengths / lengths.sum())
    starts = (rng.random(n) * np.maximum(1, lengths[documents] - WINDOW + 1)).astype(np.int64)
    query = "SELECT document, position, value FROM features WHERE layer = ? AND feature = ? ORDER BY document, position"
    rows = store.sql(query, [layer, feature])
    places = rows["document"].to_numpy().astype(np.int64) << 32 | rows["position"].to_numpy()
    values = rows["value"].to_numpy()
    first = np.searchsorted(places, documents << 32 | starts)
    last = np.searchsorted(places, documents << 32 | (starts + WINDOW))
    return np.array([values[a:b].max(initial=0.0) for a, b in zip(first, last, strict=True)], np.float64)
