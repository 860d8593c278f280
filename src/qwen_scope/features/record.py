"""What `show` and `find` learn of a feature goes into the store's record, and nothing in it is measured twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from qwen_scope.scope import Scope
from qwen_scope.store import FeatureStore

from .find import Findings
from .neighbours import Neighbour, cofiring, elsewhere
from .notes import Notes
from .page import FeaturePage

FOUND = "find "
"""How the names of what `find` learnt begin."""
NEIGHBOURS = ("cofiring", "elsewhere")
"""The parts of a page that take a look at every activation of the layers."""


def with_neighbours(
    page: FeaturePage, store: FeatureStore, scope: Scope | None = None, n: int = 10, *, again: bool = False
) -> FeaturePage:
    """The page with what fires on the same tokens in its own layer and others: from the record, or measured and kept.

    Args:
        page: made without them (`feature_page(..., with_cofiring=False)`).
        scope: for cosines; layers that it does not have are left out.
        n: how many of the own layer.
        again: measure although the record has them.
    """
    layers = [one for one in store.layers if one != page.layer and (scope is None or one in scope.layers)]
    notes = Notes(store)
    known = None if again else notes.known(page.layer, page.feature, "neighbours")
    if not _covers(known, n, layers, scope is not None):
        found = {
            "cofiring": cofiring(store, page.layer, page.feature, n),
            "elsewhere": elsewhere(page.layer, page.feature, layers, scope=scope, store=store),
        }
        known = {"n": n, "layers": layers, "cosines": scope is not None}
        known |= {name: [asdict(one) for one in some] for name, some in found.items()}
        notes.learn(page.layer, page.feature, "neighbours", known)
    assert known is not None
    parts = {name: tuple(Neighbour(**one) for one in known[name]) for name in NEIGHBOURS}
    return replace(page, cofiring=parts["cofiring"][:n], elsewhere=parts["elsewhere"])


def _covers(known: Mapping[str, Any] | None, n: int, layers: list[int], cosines: bool) -> bool:
    """Whether what the record holds is enough; what another version wrote in another shape is not."""
    if known is None or not {"n", "layers", "cosines", *NEIGHBOURS} <= known.keys():
        return False
    return known["n"] >= n and known["layers"] == layers and (known["cosines"] or not cosines)


def remember_findings(store: FeatureStore, found: Findings, positive: str, negative: str) -> None:
    """Keep with every significant feature which two sets of documents it tells apart, and how well."""
    notes = Notes(store)
    for one in found.found:
        if one.significant:
            body = {"against": negative, "f1": asdict(one.f1), "auroc": asdict(one.auroc), "q": one.q}
            notes.learn(one.layer, one.feature, f"{FOUND}{positive}", body)


def remembered_findings(store: FeatureStore, layer: int, feature: int) -> tuple[Mapping[str, Any], ...]:
    """What `find` learnt of a feature, the newest of each pair of sets."""
    return tuple(
        one
        for one in Notes(store).measured(layer, feature)
        if one["name"].startswith(FOUND) and {"against", "auroc", "f1", "q"} <= one.keys()
    )
