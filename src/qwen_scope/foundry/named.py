"""Labels that the lab ships: made from contexts alone, by the labeller that any model has."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from qwen_scope.errors import InputError
from qwen_scope.features import (
    Label,
    LabelOptions,
    Material,
    RuleJudge,
    beside_others,
    make_label,
    material,
    scored_label,
)
from qwen_scope.files import append_lines
from qwen_scope.lab import documents
from qwen_scope.model import LoadedModel
from qwen_scope.scope import Scope, extract
from qwen_scope.store import FeatureStore
from qwen_scope.text import Corpus


@dataclass(frozen=True)
class NamingConfig:
    """How many features are tried, and on what.

    Attributes:
        n_documents, seed: of the corpus whose contexts names are made from and tested on.
        features: of each layer, drawn at random among those that fire in at least `fires_in` documents.
        others: labels of other features that are the control of each.
        panel: the layer whose labels they are.
        label: examples and tests of each.
    """

    n_documents: int = 1200
    seed: int = 77
    features: int = 130
    fires_in: int = 120
    others: int = 10
    panel: int = 4
    label: LabelOptions = field(default_factory=lambda: LabelOptions(examples=24, tests=40))


def name_features(scope: Scope, out: Path, config: NamingConfig | None = None) -> dict[int, int]:
    """Write the labels that beat those of other features, with an interval apart, to a new file of entries.

    Features that no wording tells, and those whose label is at chance, are left without a name.

    Returns:
        by layer how many features are named.

    Raises:
        InputError: the file exists.
    """
    config, judge = config or NamingConfig(), RuleJudge()
    if out.exists():
        raise InputError(f"can't write {out}: it exists; name a new file")
    texts = [{"text": one.text} for one in documents(seed=config.seed, n=config.n_documents)]
    found: dict[int, int] = {}
    with TemporaryDirectory(prefix="qwen-scope-names-") as folder:
        loaded = LoadedModel(scope.model, scope.tokenizer, scope.name)
        saes = {layer: scope.saes[layer] for layer in scope.layers}
        with extract(Corpus(texts, name="names"), loaded, saes, Path(folder) / "store") as store:
            panel: list[str] = []
            for layer in sorted(scope.layers, key=lambda one: one != config.panel):
                made = _labels(store, layer, judge, config)
                panel = panel or [label.text for label, _ in made.values()]
                named = {
                    feature: _beside(label, given, judge, panel, config) for feature, (label, given) in made.items()
                }
                kept = {feature: label for feature, label in named.items() if not label.at_chance}
                fingerprint = store.layer(layer).fingerprint
                entries = [make_label(layer, feature, fingerprint, one, "qwen-scope") for feature, one in kept.items()]
                append_lines(out, (one.to_line() for one in entries))
                found[layer] = len(kept)
    return found


def _labels(
    store: FeatureStore, layer: int, judge: RuleJudge, config: NamingConfig
) -> dict[int, tuple[Label, Material]]:
    """The labels of some features of a layer that a wording tells, each with its contexts."""
    enough = np.flatnonzero(store.stats(layer)["documents"].to_numpy() >= config.fires_in)
    chosen = np.random.default_rng(layer).permutation(enough)[: config.features].tolist()
    made = {}
    for feature in chosen:
        try:
            given = material(store, layer, feature, config.label)
            label = scored_label(given, judge)
        except InputError:  # it fires nearly everywhere, so nothing is left to test a name with
            continue
        if not judge.is_unclear(label.text):
            made[feature] = label, given
    return made


def _beside(label: Label, given: Material, judge: RuleJudge, panel: list[str], config: NamingConfig) -> Label:
    """The label with what others tell of the same contexts."""
    others = [text for text in panel if text != label.text]
    rng = np.random.default_rng((config.seed, given.layer, given.feature))
    return beside_others(label, given, judge, others, config.others, rng)
