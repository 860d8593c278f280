"""A feature card in OpenInterpretability's shape: schemas/interp_card.json of its registry, version 0.1."""

from __future__ import annotations

from typing import Any

from qwen_scope.errors import InputError
from qwen_scope.features import Note

from .card import Card

VERSION = "0.1"


def interp_card(card: Card) -> dict[str, Any]:
    """The card as that schema has it; what the schema has no place for is left out.

    `replication_status` tells how many other dictionaries that were looked at have the feature: `multiple`, `single`,
    or `none`; it is left out where none was looked at.

    Raises:
        InputError: the feature has no label in the store, which the schema asks for.
    """
    page = card.page
    made = [note for note in page.notes if note.kind == "label" and note.label == page.label]
    if page.label is None or not made:
        raise InputError(
            f"layer {page.layer}, feature {page.feature} has no label in the store, and an interpretation card needs"
            f" one: qwen-scope label STORE --features {page.layer}/{page.feature}"
        )
    out: dict[str, Any] = {
        "schema_version": VERSION,
        "feature_id": f"{page.group}-L{page.layer}-f{page.feature}",
        "model_target": {
            "model_id": page.model,
            "layer": page.layer,
            "sae_id": page.group,
            "feature_index": page.feature,
        },
        "autointerp_label": page.label.text,
        "autointerp_provenance": _provenance(made[-1]),
        "top_activating_contexts": [
            {"text": one.text, "activation": one.value, "token_position": one.position - one.start}
            for one in page.strongest
        ],
    }
    if card.siblings:
        found = sum(one.found for one in card.siblings)
        out["replication_status"] = "none" if not found else "single" if found == 1 else "multiple"
    return out


def _provenance(note: Note) -> dict[str, Any]:
    return {"labeler_model": note.label.source, "method": "top_activating_contexts", "date": note.made}
