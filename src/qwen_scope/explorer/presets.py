"""What the page begins with on the lab: features that detect a factor of its texts, and amounts for some."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen_scope.sae import catalog, layers_of, load_sae
from qwen_scope.scope import Scope, model_source

AMOUNTS = {"de": ("German", 0.49)}
"""By factor its name and the amount that a sweep with the page's own settings proposes, in typical residuals."""

USUAL = 0.3
"""An amount to begin with where none was measured, in typical residuals."""

PROMPT = "[12:30] Anna: "


def known_features(scope: Scope) -> list[dict[str, Any]]:
    """Features of the lab that detect a factor of its texts, best first; none of another model or SAE."""
    if scope.name != model_source("lab"):
        return []
    measured = json.loads((Path(model_source("lab")).parent / "metrics.json").read_text(encoding="utf-8"))
    ours = {layer for layer in scope.layers if of_the_lab(scope, layer)}
    return sorted((one for one in measured["detectors"] if one["layer"] in ours), key=lambda one: -one["f1"])


def of_the_lab(scope: Scope, layer: int) -> bool:
    """Whether the SAE of a layer is the lab's own, wherever it lies; in any other its numbers mean nothing."""
    group = catalog.find("lab").name
    return layer in layers_of(group) and (
        load_sae(group, layer).identity.fingerprint == scope.saes[layer].identity.fingerprint
    )


def presets_of(known: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Interventions that work at once, by their name."""
    by_factor = {one["factor"]: one for one in known}
    return {
        name: intervention(by_factor[factor]["layer"], by_factor[factor]["feature"], amount)
        for factor, (name, amount) in AMOUNTS.items()
        if factor in by_factor
    }


def intervention(layer: int, feature: int | None, amount: float) -> dict[str, Any]:
    """The fields of an `add` at all tokens."""
    return {"layer": layer, "feature": feature, "op": "add", "amount": amount, "unit": "resid_norm", "where": "all"}
