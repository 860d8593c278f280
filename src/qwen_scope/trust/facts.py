"""What a card reads off a store and its page: which feature it is, what is wrong with it, and which SAEs are near."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_scope.features import FeaturePage
from qwen_scope.sae import catalog
from qwen_scope.store import FeatureStore

from .fade import faithfulness
from .rules import TrustRules


def identity(store: FeatureStore, layer: int) -> dict[str, Any]:
    info = store.layer(layer)
    listed = catalog.lookup(info.group)
    return {
        "group": info.group,
        "fingerprint": info.fingerprint,
        "layer": layer,
        "hook_point": info.hook_point,
        "d_sae": info.d_sae,
        "k": info.k,
        "architecture": info.architecture,
        "model": store.manifest.model,
        "kind": None if listed is None else listed.kind,
        "documents": store.manifest.documents,
        "tokens": info.tokens,
        "revision": store.manifest.sources.get("saes", {}).get("name", "").partition("@")[2] or None,
    }


def faithfulness_of(verdict: Mapping[str, Any] | None) -> float | None:
    """FADE's faithfulness of what `validate` recorded, where its target is a share."""
    found = {one["name"]: one["effect"]["estimate"] for one in (verdict or {}).get("conditions", ())}
    shares = [found.get("this feature"), found.get("unsteered")]
    if None in shares or not all(0 <= float(one) <= 1 for one in shares if one is not None):
        return None
    return faithfulness([float(shares[0])], float(shares[1]))  # type: ignore[arg-type]


def failures(page: FeaturePage, rules: TrustRules) -> tuple[str, ...]:
    """What is known to be wrong with a feature."""
    s, out = page.summary, []
    if s is not None and not s.tokens:
        out.append("it never fires in this store")
    elif s is not None:
        if s.documents < rules.documents:
            out.append(f"it fires in {s.documents} documents alone")
        if s.frequency > rules.dense:
            out.append(f"it is dense: it fires on {s.frequency:.0%} of the tokens")
        first = sum(one.position <= 1 for one in page.strongest)
        if page.strongest and first > len(page.strongest) / 2:
            out.append("most of its strongest contexts are at the first two tokens of a document")
    if page.label is not None and page.label.at_chance:
        out.append("its label is at chance")
    twins = [one.feature for one in page.similar if (one.cosine or 0) >= 0.9]
    if twins:
        out.append(f"its direction has twins in the same dictionary: {', '.join(map(str, twins))}")
    if page.verdict is not None and page.verdict.get("outcome") != "causal":
        out.append(f"validate: {page.verdict.get('outcome')}")
    return tuple(out)


def relatives(store: FeatureStore, layer: int) -> tuple[str, ...]:
    """Groups of the catalog for the same model that have SAEs of the layer: of another k, width or kind of model."""
    mine = catalog.lookup(store.layer(layer).group)
    if mine is None:
        return ()
    width = (mine.d_model, mine.hook_point)
    return tuple(
        one.name
        for one in catalog.groups()
        if one.name != mine.name
        and layer in one.layer_numbers
        and (one.d_model, one.hook_point) == width
        and _family(one.model) == _family(mine.model)
    )


def _family(model: str) -> str:
    """A model's name without what tells its base from its instruct version."""
    name = model.rpartition("/")[2].lower()
    return name.removesuffix("-base").removesuffix("-instruct").removesuffix("-it")
