"""A store as Neuronpedia takes it: bodies for its public upload, and the files of a bulk import.

What its upload route and its database refuse is refused or mended here: no token is the empty string, names of methods
and models are registered ones, keys of users are given or the bulk files are left out, and model ids are lower case.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from qwen_scope.errors import InputError, check_count
from qwen_scope.files import write_folder, write_text
from qwen_scope.model import HookPoint, text_config
from qwen_scope.report import Progress
from qwen_scope.scope import Scope
from qwen_scope.store import Context, FeatureStore

from .effects import TokenEffect, token_effects
from .label_entry import Label
from .notes import Notes

# The limits of Neuronpedia's upload, and the strata that activations are drawn from.
BATCH, EXPLANATION, STRATA = 128, 512, 5
METHOD, EXPLAINER = "oai_token-act-pair", "gpt-4o-mini"
"""Registered there as ways and models of explanations; it takes no other names."""
SPLIT = "\ufffd"
"""Stands for a token that shows nothing by itself: a part of a character that several byte tokens share."""


@dataclass(frozen=True)
class Creator:
    """Who a bulk import belongs to, and what it says of the model; an upload knows its user by the key.

    Attributes:
        id, name: of a user that exists there.   owner: of the model, such as Qwen.
        layers, neurons: of the model: its decoder layers, and the width of an MLP; None takes them from the scope.

    Raises:
        InputError: an empty text, or a count that is none.
    """

    id: str
    name: str
    owner: str
    layers: int | None = None
    neurons: int | None = None

    def __post_init__(self) -> None:
        for key in ("id", "name", "owner"):
            if not getattr(self, key).strip():
                raise InputError(f"the {key} of a bulk import is empty; Neuronpedia needs one that exists there")
        for key in ("layers", "neurons"):
            if getattr(self, key) is not None:
                check_count(f"the {key} of the model", getattr(self, key))

    def sized(self, scope: Scope | None) -> tuple[int, int]:
        """Layers and neurons per layer.

        Raises:
            InputError: they are not given, and there is no model that says them.
        """
        config = None if scope is None else text_config(scope.model)
        layers = self.layers or getattr(config, "num_hidden_layers", None)
        neurons = self.neurons or getattr(config, "intermediate_size", None)
        if not layers or not neurons:
            raise InputError(
                "a bulk import needs how many layers the model has and how many neurons each; give both"
                " (--model-layers, --model-neurons)"
            )
        return int(layers), int(neurons)


@dataclass(frozen=True)
class Exported:
    """One feature as the exports need it: contexts with the bounds and share of their stratum."""

    index: int
    frequency: float
    maximum: float
    label: Label | None
    contexts: tuple[tuple[Context, float, float, float], ...]
    promoted: tuple[TokenEffect, ...]
    demoted: tuple[TokenEffect, ...]
    edges: tuple[float, ...]
    counts: tuple[int, ...]


def export_neuronpedia(
    store: FeatureStore,
    layer: int,
    folder: str | os.PathLike[str],
    *,
    model_id: str,
    set_name: str,
    creator: Creator | None = None,
    method: str = METHOD,
    explainer: str = EXPLAINER,
    scope: Scope | None = None,
    features: Sequence[int] | None = None,
    contexts: int = 20,
    progress: Progress | None = None,
) -> int:
    """Write what Neuronpedia takes for one layer; returns how many features.

    `upload/batch-N.json` are bodies for its public upload, at most 128 features each. With a `creator` there is a bulk
    import beside them: `release.jsonl`, `model.jsonl`, `sourceset.jsonl`, `source.jsonl` and gzipped `features`,
    `activations` and `explanations`. Features that never fire are left out, because an upload needs an activation.
    Explanations are the labels of the store; who wrote them and how well they scored stands in `labels.jsonl`, which
    Neuronpedia does not read: it registers the names of methods and models.

    The folder appears when it is complete.

    Args:
        folder: new or empty.
        model_id, set_name: as Neuronpedia names model and source set; the source is `LAYER-SET`.
        creator: for a bulk import; without it only the upload is written.
        method, explainer: how explanations are said to be made, and by which model; names that are registered there.
        scope: for the tokens a feature promotes; without it those lists are empty.
        features: which; by default all that fire.
        contexts: activations per feature, from five strata of equal size.
        progress: called with the stage, its share done (0 to 1) and a short text.

    Raises:
        InputError: the folder is not empty, an empty name, a model id that is not lower case, a `creator` without
            the sizes of the model where no scope says them, or no feature that fires.
        NotFoundError: a feature that the store does not have.
    """
    check_count("contexts", contexts)
    for name, value in {"model id": model_id, "set": set_name, "method": method, "explainer": explainer}.items():
        if not value.strip():
            raise InputError(f"the {name} is empty; Neuronpedia needs a name")
    if model_id != model_id.lower():
        raise InputError(f"Neuronpedia's model ids are lower case: {model_id.lower()!r}, not {model_id!r}")
    for feature in features or ():
        store.check_feature(layer, feature)
    frequency = store.stats(layer)["frequency"].to_numpy()
    chosen = [f for f in (range(len(frequency)) if features is None else features) if frequency[f] > 0]
    if not chosen:
        raise InputError("none of the features fires in the store, so there is nothing that Neuronpedia takes")
    labels = {feature: label for (at, feature), label in Notes(store).labels().items() if at == layer}
    source = f"{layer}-{set_name}"
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    common = {"modelId": model_id, "layer": source}
    made_by = {"methodName": method, "modelName": explainer}
    with write_folder(folder) as out:
        if creator is not None:
            write_heads(out, store, layer, model_id, set_name, creator, creator.sized(scope), now)
        known = [f for f in chosen if f in labels]
        write_text(out / "labels.jsonl", "".join(label_line(f, labels[f]) + "\n" for f in known))
        for number, start in enumerate(range(0, len(chosen), BATCH)):
            some = [gathered(store, layer, f, scope, contexts, labels.get(f)) for f in chosen[start : start + BATCH]]
            body = {"modelId": model_id, "source": source, "features": [upload_row(one, made_by) for one in some]}
            write_text(out / "upload" / f"batch-{number}.json", json.dumps(body, ensure_ascii=False))
            if creator is not None:
                write_batch(out, number, some, hook_name(store, layer), common, creator, made_by, now)
            if progress is not None:
                done = start + len(some)
                progress("neuronpedia", done / len(chosen), f"{done} of {len(chosen)}")
    return len(chosen)


def write_batch(
    out: Path,
    number: int,
    some: Sequence[Exported],
    hook: str,
    common: dict[str, str],
    creator: Creator,
    made_by: dict[str, str],
    now: str,
) -> None:
    """One file of each kind of a bulk import."""
    name, owned = f"batch-{number}.jsonl.gz", {**common, "creatorId": creator.id, "createdAt": now}
    write_lines(out / "features" / name, (feature_row(one, hook, owned) for one in some))
    write_lines(out / "activations" / name, (row for one in some for row in activation_rows(one, owned)))
    explained = (
        explanation_row(one.index, one.label, common, creator.id, made_by) for one in some if one.label is not None
    )
    write_lines(out / "explanations" / name, explained)


def label_line(feature: int, label: Label) -> str:
    """A label with everything that is known of it, as a line of JSON."""
    return json.dumps({"index": str(feature), **asdict(label), "at_chance": label.at_chance}, ensure_ascii=False)


def hook_name(store: FeatureStore, layer: int) -> str:
    """The stream that the SAE reads, as TransformerLens names it."""
    return f"blocks.{layer}.hook_{HookPoint.parse(store.layer(layer).hook_point).stream}"


def seen(token: str) -> str:
    """A token as it is shown there: never the empty string."""
    return token or SPLIT


def gathered(
    store: FeatureStore, layer: int, feature: int, scope: Scope | None, n: int, label: Label | None
) -> Exported:
    """A feature with its contexts; the quantiles of its activations bound the strata."""
    summary, histogram = store.feature(layer, feature), store.histogram(layer, feature, 50)
    edges = store.quantiles(layer, feature, [i / STRATA for i in range(STRATA + 1)])
    found = store.contexts(layer, feature, n, how="quantiles", strata=STRATA, before=40, after=20)
    placed = []
    for context in found:
        at = min(STRATA - 1, max(0, int(np.searchsorted(edges, context.value, side="left")) - 1))
        placed.append((context, float(edges[at]), float(edges[at + 1]), 1 / STRATA))
    promoted, demoted = token_effects(scope, layer, feature, 10) if scope is not None else ((), ())
    bars = tuple(histogram.edges.tolist()), tuple(histogram.counts.tolist())
    return Exported(
        feature, summary.frequency, summary.maximum, label, tuple(placed), tuple(promoted), tuple(demoted), *bars
    )


def upload_row(one: Exported, made_by: dict[str, str]) -> dict[str, Any]:
    """A feature of an upload."""
    return {
        "index": one.index,
        "density": one.frequency,
        "topLogits": [{"token": seen(effect.text), "value": effect.effect} for effect in one.promoted],
        "bottomLogits": [{"token": seen(effect.text), "value": effect.effect} for effect in one.demoted],
        "explanations": [{"text": described(one.label), **made_by}] if one.label is not None else [],
        "activations": [
            {
                "tokens": [seen(token) for token in context.tokens],
                "values": list(context.values),
                "quantileMin": low,
                "quantileMax": high,
                "quantileFraction": share,
            }
            for context, low, high, share in one.contexts
        ],
    }


def described(label: Label) -> str:
    """The text of an explanation; that of a label at chance says so."""
    return label.shown[:EXPLANATION]


def feature_row(one: Exported, hook: str, common: dict[str, str]) -> dict[str, Any]:
    """A feature of a bulk export."""
    empty = ("neuron_alignment", "correlated_neurons", "correlated_features")
    return {
        **common,
        "index": str(one.index),
        "maxActApprox": one.maximum,
        "hasVector": False,
        "vector": [],
        "vectorLabel": None,
        "vectorDefaultSteerStrength": one.maximum,
        "hookName": hook,
        "topkCosSimIndices": [],
        "topkCosSimValues": [],
        **{f"{name}_indices": [] for name in empty},
        "neuron_alignment_values": [],
        **{f"{name}_pearson": [] for name in empty[1:]},
        **{f"{name}_l1": [] for name in empty},
        "pos_str": [seen(effect.text) for effect in one.promoted],
        "pos_values": [effect.effect for effect in one.promoted],
        "neg_str": [seen(effect.text) for effect in one.demoted],
        "neg_values": [effect.effect for effect in one.demoted],
        "frac_nonzero": one.frequency,
        # One value per bar: its middle.
        "freq_hist_data_bar_values": [(a + b) / 2 for a, b in zip(one.edges, one.edges[1:], strict=False)],
        "freq_hist_data_bar_heights": list(one.counts),
        "logits_hist_data_bar_heights": [],
        "logits_hist_data_bar_values": [],
        "decoder_weights_dist": [],
    }


def activation_rows(one: Exported, common: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The contexts of a feature in a bulk export."""
    for context, low, high, share in one.contexts:
        at = context.position - context.start
        key = f"{common['modelId']}|{common['layer']}|{one.index}|{context.document}|{context.position}"
        yield {
            "id": "c" + hashlib.sha256(key.encode()).hexdigest()[:24],
            **common,
            "index": str(one.index),
            "tokens": [seen(token) for token in context.tokens],
            "values": list(context.values),
            "maxValue": max(context.values),
            "maxValueTokenIndex": int(np.argmax(context.values)),
            "minValue": min(context.values),
            "binMin": low,
            "binMax": high,
            "binContains": share,
            "qualifyingTokenIndex": at,
            "dfaValues": [],
            "dfaTargetIndex": None,
            "dfaMaxValue": None,
            "lossValues": [],
            "logitContributions": None,
        }


def explanation_row(
    index: int, label: Label, common: dict[str, str], author: str, made_by: dict[str, str]
) -> dict[str, Any]:
    """A label in a bulk import."""
    key = f"{common['modelId']}|{common['layer']}|{index}|{label.text}"
    return {
        "id": "c" + hashlib.sha256(key.encode()).hexdigest()[:24],
        **common,
        "index": str(index),
        "description": described(label),
        "authorId": author,
        "typeName": made_by["methodName"],
        "explanationModelName": made_by["modelName"],
    }


def write_heads(
    out: Path,
    store: FeatureStore,
    layer: int,
    model_id: str,
    set_name: str,
    creator: Creator,
    sizes: tuple[int, int],
    now: str,
) -> None:
    """The four one-line files of a bulk import."""
    info = store.layer(layer)
    made = {"creatorId": creator.id, "createdAt": now}
    heads = {
        "release": {
            "name": info.group,
            "description": f"Features of {info.group}",
            "creatorName": creator.name,
            **made,
        },
        "model": {
            "id": model_id,
            "displayName": store.manifest.model,
            "layers": sizes[0],
            "neuronsPerLayer": sizes[1],
            "owner": creator.owner,
            **made,
        },
        "sourceset": {
            "modelId": model_id,
            "name": set_name,
            "description": info.group,
            "releaseName": info.group,
            "creatorName": creator.name,
            **made,
        },
        "source": {
            "id": f"{layer}-{set_name}",
            "modelId": model_id,
            "setName": set_name,
            "hfRepoId": info.group,
            "hookName": hook_name(store, layer),
            **made,
        },
    }
    for name, row in heads.items():
        write_text(out / f"{name}.jsonl", json.dumps(row, ensure_ascii=False) + "\n")


def write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Rows of JSON, gzipped, the same bytes every time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode(), mtime=0))
