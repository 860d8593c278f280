"""A store for other tools: delphi's latents folder, and a table of statistics."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from qwen_scope.errors import InputError, check_count
from qwen_scope.files import write_folder, write_text, write_whole
from qwen_scope.report import Progress
from qwen_scope.store import FeatureStore

from .notes import Notes

# delphi keeps nothing at or below this, and activations in half precision.
SMALLEST, LARGEST = 1e-5, 65504.0


def export_statistics(store: FeatureStore, path: str | os.PathLike[str], layers: Sequence[int] | None = None) -> int:
    """The statistics of every feature, with labels and their scores, as CSV or Parquet by the name; how many rows.

    Raises:
        InputError: another ending, or a file that can't be written.
    """
    target = Path(path)
    if target.suffix not in (".csv", ".parquet"):
        raise InputError(f"statistics are written to a .csv or .parquet file, not {target.name!r}")
    labels = Notes(store).labels()
    kinds = {"label": pa.string(), "label_source": pa.string(), "label_at_chance": pa.bool_()}
    tables = []
    for layer in store.layers if layers is None else layers:
        table = store.stats(layer).drop_columns(["first_row"])
        kept = [labels.get((layer, feature)) for feature in range(len(table))]
        table = table.add_column(0, "layer", pa.array(np.full(len(table), layer, np.int32)))
        columns: dict[str, list[Any]] = {
            "label": [one and one.text for one in kept],
            "label_at_chance": [one and one.at_chance for one in kept],
            "label_source": [one and one.source for one in kept],
            "label_detection": [one and one.detection.estimate for one in kept],
            "label_fuzzing": [one and one.fuzzing.estimate for one in kept],
        }
        for name, values in columns.items():
            table = table.append_column(name, pa.array(values, kinds.get(name, pa.float64())))
        tables.append(table)
    whole = pa.concat_tables(tables)
    with write_whole(target) as part:
        pq.write_table(whole, part) if target.suffix == ".parquet" else pa_csv.write_csv(whole, part)
    return len(whole)


def export_delphi(
    store: FeatureStore,
    folder: str | os.PathLike[str],
    *,
    layers: Sequence[int] | None = None,
    module: str = "layers.{}",
    context: int = 256,
    splits: int = 5,
    model_name: str | None = None,
    progress: Progress | None = None,
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
        progress: called with the stage, its share done (0 to 1) and a short text.

    Raises:
        InputError: the folder is not empty, or there are fewer tokens than one row.
    """
    check_count("splits", splits)
    rows = store.manifest.tokens // check_count("context", context)
    if rows < 1:
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
                if progress is not None:
                    done, of = i * splits + part + 1, len(chosen) * splits
                    progress("delphi", done / of, f"{done} of {of}")
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
