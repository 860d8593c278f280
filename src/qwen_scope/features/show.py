"""All about one feature, as plain data: what the terminal, the HTML file and the explorer show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qwen_scope.errors import InputError, NotFoundError, check_count
from qwen_scope.scope import Scope
from qwen_scope.store import FeatureStore

from .effects import token_effects
from .explanations import explanations_of
from .lens import Lens, lens_effects
from .naming import label_of
from .neighbours import cofiring, elsewhere, similar
from .notes import Notes
from .page import FeaturePage

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


def feature_page(
    layer: int,
    feature: int,
    *,
    store: FeatureStore | None = None,
    scope: Scope | None = None,
    n: int = 10,
    contexts: int = 12,
    before: int = 20,
    after: int = 10,
    bins: int = 30,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    with_cofiring: bool = True,
    lens: Lens | None = None,
) -> FeaturePage:
    """Gather all about one feature.

    Args:
        store: where it fires, its notes and what fires with it come from here, and its label, where it has one; else
            that lies beside the SAEs.
        scope: its direction comes from here: tokens it promotes, features of like direction. With both, the store must
            have been made with the scope's SAE.
        n: how many tokens and neighbours of each kind.
        contexts: how many strongest contexts, and as many spread over its strength.
        before, after: tokens around each place.
        bins: of the histogram.
        layers: where to look for the same feature; by default every layer of the store but its own, or none without.
        with_cofiring: look for what fires with it. `cofiring`, and with a store `elsewhere`, read every activation of a
            layer, which takes most of the time; without it they stay empty.
        lens: a Jacobian lens of the model, read beside the direct effects; it needs a scope.

    Raises:
        InputError: neither a store nor a scope.   NotFoundError: no such layer or feature.
        MismatchError: the store was made with another SAE.
    """
    for name, value in {"n": n, "contexts": contexts, "bins": bins}.items():
        check_count(name, value)
    if store is None and scope is None:
        raise InputError("a feature is shown from a store, from a model with its SAEs, or both")
    if scope is not None:
        layer = scope.check_layers([layer])[0]
        sae = scope.saes[layer]
        if not 0 <= feature < sae.d_sae:
            raise NotFoundError(f"layer {layer} has features 0 to {sae.d_sae - 1}, not {feature}")
        if store is not None:
            store.require(layer, sae)
    found: dict[str, Any] = {}
    if store is not None:
        found |= _from_store(store, layer, feature, n, contexts, before, after, bins, seed)
        if with_cofiring:
            found["cofiring"] = cofiring(store, layer, feature, n)
    others = layers if layers is not None else (store.layers if store is not None else [])
    if scope is not None:
        found["promoted"], found["demoted"] = token_effects(scope, layer, feature, n)
        if lens is not None:
            found["lens"] = lens_effects(scope, lens, layer, feature, n)
        found["similar"] = similar(scope, layer, feature, n)
        others = [other for other in others if other in scope.layers]
    if with_cofiring or store is None:
        found["elsewhere"] = elsewhere(layer, feature, others, scope=scope, store=store)
    group = store.layer(layer).group if store is not None else scope.saes[layer].identity.group if scope else ""
    model = store.manifest.model if store is not None else scope.name if scope else ""
    label = label_of(layer, feature, scope=scope, store=store)
    return FeaturePage(layer, feature, group, model, label=label, **found)


def _from_store(
    store: FeatureStore, layer: int, feature: int, n: int, contexts: int, before: int, after: int, bins: int, seed: int
) -> dict[str, Any]:
    """What a store knows about a feature."""
    summary = store.feature(layer, feature)
    notes = Notes(store)
    verdicts = notes.of(layer, feature, "verdict")
    shares = dict(zip(SHARES, store.quantiles(layer, feature, SHARES).tolist(), strict=True)) if summary.tokens else {}
    return {
        "store": str(store.folder),
        "summary": summary,
        "quantiles": shares,
        "histogram": store.histogram(layer, feature, bins),
        "strongest": tuple(store.contexts(layer, feature, contexts, before=before, after=after, per_document=True)),
        "spread": tuple(
            store.contexts(layer, feature, contexts, how="quantiles", before=before, after=after, seed=seed)
        ),
        "explanations": explanations_of(store, layer, feature),
        "notes": tuple(note for note in notes.of(layer, feature) if note.kind != "measure"),
        "verdict": dict(verdicts[-1].body) if verdicts else None,
    }
