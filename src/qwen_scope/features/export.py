"""A store for other tools: Neuronpedia's upload and bulk files, delphi's latents folder, a table of statistics."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from qwen_scope.corpus import Context, FeatureStore
from qwen_scope.errors import InputError
from qwen_scope.files import write_folder, write_text, write_whole
from qwen_scope.scope import Scope

from .effects import TokenEffect, token_effects
from .notes import Label, Notes

# The limits of Neuronpedia's upload, and the strata that activations are drawn from.
BATCH, EXPLANATION, STRATA = 128, 512, 5
# delphi keeps nothing at or below this, and activations in half precision.
SMALLEST, LARGEST = 1e-5, 65504.0


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


def export_statistics(store: FeatureStore, path: str | os.PathLike[str], layers: Sequence[int] | None = None) -> int:
    """The statistics of every feature, with labels and their scores, as CSV or Parquet by the name; how many rows.

    Raises:
        InputError: another ending, or a file that can't be written.
    """
    target = Path(path)
    if target.suffix not in (".csv", ".parquet"):
        raise InputError(f"statistics are written to a .csv or .parquet file, not {target.name!r}")
    labels = Notes(store).labels()
    tables = []
    for layer in store.layers if layers is None else layers:
        table = store.stats(layer).drop_columns(["first_row"])
        kept = [labels.get((layer, feature)) for feature in range(len(table))]
        table = table.add_column(0, "layer", pa.array(np.full(len(table), layer, np.int32)))
        columns: dict[str, list[Any]] = {
            "label": [one and one.text for one in kept],
            "label_source": [one and one.source for one in kept],
            "label_detection": [one and one.detection.estimate for one in kept],
            "label_fuzzing": [one and one.fuzzing.estimate for one in kept],
        }
        for name, values in columns.items():
            kind = pa.string() if name in ("label", "label_source") else pa.float64()
            table = table.append_column(name, pa.array(values, kind))
        tables.append(table)
    whole = pa.concat_tables(tables)
    with write_whole(target) as part:
        pq.write_table(whole, part) if target.suffix == ".parquet" else pa_csv.write_csv(whole, part)
    return len(whole)


def export_neuronpedia(
    store: FeatureStore,
    layer: int,
    folder: str | os.PathLike[str],
    *,
    model_id: str,
    set_name: str,
    scope: Scope | None = None,
    features: Sequence[int] | None = None,
    contexts: int = 20,
    report: Callable[[int, int], None] | None = None,
) -> int:
    """Write what Neuronpedia takes for one layer; returns how many features.

    `upload/batch-N.json` are bodies for its public upload, at most 128 features each; the rest of the folder is a bulk
    export: `release.jsonl`, `model.jsonl`, `sourceset.jsonl`, `source.jsonl` and gzipped `features`, `activations` and
    `explanations`. Features that never fire are left out, because an upload needs an activation. Explanations are the
    labels of the store; the method's name says with which scores.

    The folder appears when it is complete.

    Args:
        folder: new or empty.
        model_id, set_name: as Neuronpedia names model and source set; the source is `LAYER-SET`.
        scope: for the tokens a feature promotes; without it those lists are empty.
        features: which; by default all that fire.
        contexts: activations per feature, from five strata of equal size.

    Raises:
        InputError: the folder holds something.
    """
    frequency = store.stats(layer)["frequency"].to_numpy()
    chosen = [f for f in (range(len(frequency)) if features is None else features) if frequency[f] > 0]
    labels, source = Notes(store).labels(), f"{layer}-{set_name}"
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    common = {"modelId": model_id, "layer": source, "creatorId": "", "createdAt": now}
    with write_folder(folder) as out:
        write_heads(out, store, layer, model_id, set_name, now)
        for number, start in enumerate(range(0, len(chosen), BATCH)):
            batch = chosen[start : start + BATCH]
            some = [gathered(store, layer, f, scope, contexts, labels.get((layer, f))) for f in batch]
            body = {"modelId": model_id, "source": source, "features": [upload_row(one) for one in some]}
            write_text(out / "upload" / f"batch-{number}.json", json.dumps(body, ensure_ascii=False))
            write_batch(out, number, some, layer, common)
            if report is not None:
                report(start + len(some), len(chosen))
    return len(chosen)


def write_batch(out: Path, number: int, some: Sequence[Exported], layer: int, common: dict[str, str]) -> None:
    """One file of each kind of a bulk export."""
    name = f"batch-{number}.jsonl.gz"
    write_lines(out / "features" / name, (feature_row(one, layer, common) for one in some))
    write_lines(out / "activations" / name, (row for one in some for row in activation_rows(one, common)))
    explained = (explanation_row(one.index, one.label, common) for one in some if one.label is not None)
    write_lines(out / "explanations" / name, explained)


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


def upload_row(one: Exported) -> dict[str, Any]:
    """A feature of an upload."""
    return {
        "index": one.index,
        "density": one.frequency,
        "topLogits": [{"token": effect.text, "value": effect.effect} for effect in one.promoted],
        "bottomLogits": [{"token": effect.text, "value": effect.effect} for effect in one.demoted],
        "explanations": [explained(one.label)] if one.label is not None else [],
        "activations": [
            {
                "tokens": list(context.tokens),
                "values": list(context.values),
                "quantileMin": low,
                "quantileMax": high,
                "quantileFraction": share,
            }
            for context, low, high, share in one.contexts
        ],
    }


def explained(label: Label) -> dict[str, str]:
    """A label as an explanation; its scores stay with it."""
    method = f"qwen-scope detection {label.detection.estimate:.2f} fuzzing {label.fuzzing.estimate:.2f}"
    return {"text": label.text[:EXPLANATION], "methodName": method, "modelName": label.source}


def feature_row(one: Exported, layer: int, common: dict[str, str]) -> dict[str, Any]:
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
        "hookName": f"blocks.{layer}.hook_resid_post",
        "topkCosSimIndices": [],
        "topkCosSimValues": [],
        **{f"{name}_indices": [] for name in empty},
        "neuron_alignment_values": [],
        **{f"{name}_pearson": [] for name in empty[1:]},
        **{f"{name}_l1": [] for name in empty},
        "pos_str": [effect.text for effect in one.promoted],
        "pos_values": [effect.effect for effect in one.promoted],
        "neg_str": [effect.text for effect in one.demoted],
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
            "tokens": list(context.tokens),
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


def explanation_row(index: int, label: Label, common: dict[str, str]) -> dict[str, Any]:
    """A label in a bulk export."""
    text = explained(label)
    key = f"{common['modelId']}|{common['layer']}|{index}|{label.text}"
    return {
        "id": "c" + hashlib.sha256(key.encode()).hexdigest()[:24],
        "modelId": common["modelId"],
        "layer": common["layer"],
        "index": str(index),
        "description": text["text"],
        "authorId": "",
        "embedding": [],
        "typeName": text["methodName"],
        "explanationModelName": label.source,
    }


def write_heads(out: Path, store: FeatureStore, layer: int, model_id: str, set_name: str, now: str) -> None:
    """The four one-line files of a bulk export."""
    info = store.layer(layer)
    heads = {
        "release": {"name": info.group, "description": f"Features of {info.group}", "createdAt": now},
        "model": {"id": model_id, "displayName": store.manifest.model, "createdAt": now},
        "sourceset": {"modelId": model_id, "name": set_name, "description": info.group, "releaseName": info.group},
        "source": {
            "id": f"{layer}-{set_name}",
            "modelId": model_id,
            "setName": set_name,
            "hfRepoId": info.group,
            "hookName": f"blocks.{layer}.hook_resid_post",
        },
    }
    for name, row in heads.items():
        write_text(out / f"{name}.jsonl", json.dumps(row, ensure_ascii=False) + "\n")


def export_delphi(
    store: FeatureStore,
    folder: str | os.PathLike[str],
    *,
    layers: Sequence[int] | None = None,
    module: str = "layers.{}",
    context: int = 256,
    splits: int = 5,
    model_name: str | None = None,
    report: Callable[[int, int], None] | None = None,
) -> int:
    """Write a latents folder that delphi's reader takes; returns how many activations it holds.

    The tokens of all documents, one after the other, are cut into rows of `context` tokens, as delphi cuts a corpus;
    the last incomplete row is left out. Activations are in half precision and those at or below 1e-5 are not there, as
    in delphi's own caches.

    Args:
        folder: new or empty; usually `results/NAME/latents`.
        module: the name of a layer's module, `{}` for its number, as `named_modules()` of the model delphi runs has it.
        splits: files per layer.
        model_name: what delphi should load the tokenizer of; by default the store's model.

    Raises:
        InputError: the folder holds something, or there are fewer tokens than one row.
    """
    rows = store.manifest.tokens // context
    if rows < 1 or splits < 1:
        raise InputError(f"{store.manifest.tokens} tokens give no row of {context}; a smaller context may fit")
    total = 0
    read = store.sql("SELECT token FROM tokens ORDER BY document, position")["token"].to_numpy()
    tokens = read[: rows * context].reshape(rows, context).astype(np.int64)
    first_token = store.sql("SELECT first_token FROM documents ORDER BY document")["first_token"].to_numpy()
    chosen = list(store.layers if layers is None else layers)
    # Each name becomes a folder: it stays inside the output, and on any system. Only `{}` stands for something.
    names = [module.replace("{}", str(layer)) for layer in chosen]
    if len(set(names)) < len(names) or any(not re.fullmatch(r"(?!\.+$)[\w.-]{1,200}", name) for name in names):
        raise InputError(
            f"the module of a layer is one name with {{}} for its number, such as layers.{{}}, not {module!r}"
        )
    with write_folder(folder) as out:
        for i, layer in enumerate(chosen):
            width, where = store.layer(layer).d_sae, out / names[i]
            where.mkdir()
            for part in range(min(splits, width)):
                start, end = width * part // min(splits, width), width * (part + 1) // min(splits, width) - 1
                found = store.sql(
                    "SELECT feature, document, position, value FROM features"
                    " WHERE layer = ? AND feature BETWEEN ? AND ? AND value > ?",
                    [layer, start, end, SMALLEST],
                )
                feature, document, position, value = (found[name].to_numpy() for name in found.column_names)
                place = first_token[document] + position
                inside = place < rows * context
                spots = np.stack([place // context, place % context, feature - start], axis=1)[inside]
                kind = np.uint16 if max(rows, width) < 2**16 else np.uint32
                data = {"locations": spots.astype(kind), "tokens": tokens}
                data["activations"] = np.minimum(value[inside], LARGEST).astype(np.float16)
                save_file(data, where / f"{start}_{end}.safetensors")
                total += int(inside.sum())
                if report is not None:
                    report(i * splits + part + 1, len(chosen) * splits)
            config = {
                "dataset_repo": "",
                "dataset_split": "train",
                "dataset_name": "",
                "dataset_column": "text",
                "batch_size": 1,
                "cache_ctx_len": context,
                "ctx_len": context,
                "n_tokens": rows * context,
                "n_splits": splits,
                "model_name": model_name or store.manifest.model,
            }
            write_text(where / "config.json", json.dumps(config, indent=4) + "\n")
    return total


def write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Rows of JSON, gzipped, the same bytes every time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode(), mtime=0))
