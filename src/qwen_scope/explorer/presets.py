"""What the page begins with on the lab: features that detect a factor of its texts, and amounts for some."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen_scope.sae import catalog, layers_of, load_sae
from qwen_scope.scope import Scope, model_source

PRESETS = {
    "German": ("de", 5, 678, 0.49),
    "Russian": ("ru", 4, 750, 0.4),
    "Spanish": ("es", 3, 348, 0.4),
    "Arabic": ("ar", 5, 1530, 0.4),
}
"""By name the language, the layer, the feature, and the amount that a sweep with the page's own settings proposes, in
typical residuals. Of the features that fire most on a language alone, these are the ones that at this amount turn most
texts into it, those of the first click among them; French, Japanese, Chinese, Korean and English have none."""

LANGUAGES = {
    "zh": "Chinese", "ja": "Japanese", "ko": "Korean", "ru": "Russian", "ar": "Arabic", "en": "English", "fr": "French",
    "de": "German", "es": "Spanish",
}  # fmt: skip

USUAL = 0.3
"""An amount to begin with where none was measured, in typical residuals."""

PROMPT = "[12:30] Anna: "


def known_features(scope: Scope) -> list[dict[str, Any]]:
    """Features of the lab that detect a factor of its texts, with its `name`: languages and kinds of text before
    registers, the best first; none of another model or SAE."""
    if scope.name != model_source("lab"):
        return []
    measured = json.loads((Path(model_source("lab")).parent / "metrics.json").read_text(encoding="utf-8"))
    ours = {layer for layer in scope.layers if of_the_lab(scope, layer)}
    found = [{**one, "name": in_words(one["factor"])} for one in measured["detectors"] if one["layer"] in ours]
    return sorted(found, key=lambda one: ("/" in one["factor"], -one["f1"]))


def in_words(factor: str) -> str:
    """A factor of the lab's texts for people: `German`, `rude German`, `arithmetic`."""
    code, _, register = factor.partition("/")
    return f"{register} {LANGUAGES.get(code, code)}".strip()


def of_the_lab(scope: Scope, layer: int) -> bool:
    """Whether the SAE of a layer is the lab's own, wherever it lies; in any other its numbers mean nothing."""
    group = catalog.find("lab").name
    return layer in layers_of(group) and (
        load_sae(group, layer).identity.fingerprint == scope.saes[layer].identity.fingerprint
    )


def presets_of(scope: Scope) -> dict[str, dict[str, Any]]:
    """Interventions that work at once, by their name; none of another model or SAE than the lab's."""
    if scope.name != model_source("lab"):
        return {}
    ours = {layer for layer in scope.layers if of_the_lab(scope, layer)}
    return {
        name: intervention(layer, feature, amount)
        for name, (_, layer, feature, amount) in PRESETS.items()
        if layer in ours
    }


def intervention(layer: int, feature: int | None, amount: float) -> dict[str, Any]:
    """The fields of an `add` at all tokens."""
    return {"layer": layer, "feature": feature, "op": "add", "amount": amount, "unit": "resid_norm", "where": "all"}
