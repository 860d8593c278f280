"""All about one feature, as plain data: what the terminal, the HTML file and the explorer show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qwen_scope.errors import InputError, NotFoundError, check_count
from qwen_scope.scope import Scope
from qwen_scope.store import Context, FeatureStore, FeatureSummary, Histogram

from .effects import TokenEffect, token_effects
from .lens import Lens, LensReading, lens_effects
from .neighbours import Neighbour, cofiring, elsewhere, similar
from .notes import Label, Note, Notes

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


@dataclass(frozen=True, eq=False)
class FeaturePage:
    """All about one feature. What could not be known (no store, no model) is None or empty.

    Attributes:
        layer, feature: which.   group: the released set of its SAE.   model: where the language model came from.
        store: the folder of the store, or None.
        summary: how often and how strongly it fires.   quantiles: of its activations, by share.
        histogram: of its activations.
        strongest: the contexts of its largest activations, one per document.
        spread: contexts from every stratum of its activations, strongest first.
        promoted, demoted: tokens it makes more and less likely, by the direct path.
        lens: what a Jacobian lens reads of it, where one was given.
        similar: features of like direction.   cofiring: features on the same tokens.
        elsewhere: the same feature in other layers.
        label: the label to show, with its scores.   notes: labels, notes and verdicts on it, oldest first.
        verdict: the newest causal verdict, as `validate` gave it.
    """

    layer: int
    feature: int
    group: str
    model: str
    store: str | None = None
    summary: FeatureSummary | None = None
    quantiles: dict[float, float] | None = None
    histogram: Histogram | None = None
    strongest: tuple[Context, ...] = ()
    spread: tuple[Context, ...] = ()
    promoted: tuple[TokenEffect, ...] = ()
    demoted: tuple[TokenEffect, ...] = ()
    lens: LensReading | None = None
    similar: tuple[Neighbour, ...] = ()
    cofiring: tuple[Neighbour, ...] = ()
    elsewhere: tuple[Neighbour, ...] = ()
    label: Label | None = None
    notes: tuple[Note, ...] = ()
    verdict: dict[str, Any] | None = None

    @property
    def maximum(self) -> float:
        """The largest activation in the store: the top of every shading; 0 where nothing is known."""
        return self.summary.maximum if self.summary else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        if self.label is not None:
            data["label"] = {**asdict(self.label), "at_chance": self.label.at_chance}
        data["notes"] = [note.to_json() for note in self.notes]
        if self.histogram is not None:
            data["histogram"] = {k: np.asarray(v).tolist() for k, v in vars(self.histogram).items()}
        return {name: _plain(value) for name, value in data.items()}


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
        store: where it fires, its label and what fires with it come from here.
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
        sae = scope.saes[scope.check_layers([layer])[0]]
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
    return FeaturePage(layer, feature, group, model, **found)


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
        "label": notes.label(layer, feature),
        "notes": tuple(note for note in notes.of(layer, feature) if note.kind != "measure"),
        "verdict": dict(verdicts[-1].body) if verdicts else None,
    }


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return value
