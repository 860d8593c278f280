"""What `show` and `find` learn of a feature goes into the store's record, where its card looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from qwen_scope.store import FeatureStore

from .find import Findings
from .neighbours import Neighbour
from .notes import Notes
from .show import FeaturePage

FOUND = "find "
"""How the names of what `find` learnt begin."""
NEIGHBOURS = ("cofiring", "elsewhere")
"""The parts of a page that take a look at every activation of the layers."""


def neighbours_name(n: int, directions: bool) -> str:
    """Under which name the record holds the `n` nearest features, with cosines where directions were known."""
    return f"neighbours, {n}{', with directions' if directions else ''}"


def neighbours_of(page: FeaturePage) -> dict[str, Any]:
    """The neighbours of a page as the record holds them."""
    return {name: [asdict(one) for one in getattr(page, name)] for name in NEIGHBOURS}


def with_neighbours(page: FeaturePage, known: Mapping[str, Any]) -> FeaturePage:
    """The page with the neighbours that the record holds: the inverse of `neighbours_of`."""
    return replace(page, **{name: tuple(Neighbour(**one) for one in known[name]) for name in NEIGHBOURS})


def remember_page(store: FeatureStore, page: FeaturePage, n: int, *, directions: bool) -> None:
    """Keep what a page with neighbours has measured."""
    Notes(store).learn(page.layer, page.feature, neighbours_name(n, directions), neighbours_of(page))


def remember_findings(store: FeatureStore, found: Findings, positive: str, negative: str) -> None:
    """Keep with every significant feature which two sets of documents it tells apart, and how well."""
    notes = Notes(store)
    for one in found.found:
        if one.significant:
            body = {"against": negative, "f1": asdict(one.f1), "auroc": asdict(one.auroc), "q": one.q}
            notes.learn(one.layer, one.feature, f"{FOUND}{positive}", body)
