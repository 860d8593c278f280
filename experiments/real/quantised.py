"""How far do features of a quantised checkpoint agree with those of the dense model?

    python -m experiments.real.quantised --models lab,FOLDER [--kinds a,b] --saes FOLDER --data FOLDER [--write]

Runs in the environment of `tests/peers/run.sh quantised`, with src on the path. Each kind is written by the package
that people make it with (`quantise.py`), or by hand from its published layout, from the bundled model and from a real
one, and read by `load_scope`. A folder may have a GGUF beside it, FOLDER.gguf. Both models compute in float32, so what
differs are the weights (and the activations, where a package rounds those, too); `bfloat16` is the dense model in that
type, for comparison.

Over the tokens that count in the dense model, at each layer with an SAE: the share of the features active there that
the quantised model also has active, the median relative difference of the activations of those, and the FVU of the
residual (squared distance over the squared distance from the mean).
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from experiments.harness import At, Experiment, Row, main
from experiments.real.quantise import writer_of, writers
from experiments.sections import paragraph, table
from qwen_scope import HookPoint, load_scope
from qwen_scope.errors import MismatchError
from qwen_scope.lab import documents
from qwen_scope.model import capture
from qwen_scope.sae import catalog
from qwen_scope.scope import Scope

TITLE = "Features of quantised checkpoints"
written_by = writers()
KINDS = tuple(written_by)
DENSE = ("bfloat16", "GGUF packed", "GGUF unpacked")


@dataclass(frozen=True)
class Sizes:
    """How many texts are read."""

    texts: int = 24


def texts_of(model: str, at: At[Sizes]) -> list[str]:
    if model == "lab":
        return [one.text for one in documents(seed=5, n=at.sizes.texts)]
    with gzip.open(at.options["data"] / "xquad.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [row["text"] for row in map(json.loads, lines) if row["language"] == "en"]
    return [text[:600] for text in rows[: at.sizes.texts]]


def place(model: str) -> Path:
    return Path(str(catalog.find("lab").model)) if model == "lab" else Path(model)


def opened(at: At[Sizes], model: str, source: Path, dtype: str = "float32") -> Scope:
    return load_scope(source, "lab" if model == "lab" else at.options["saes"], device="cpu", dtype=dtype)


def streams(scope: Scope, ids: torch.Tensor, mask: torch.Tensor, layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """Residuals `(texts, seq, d_model)` by layer."""
    with torch.no_grad():
        found = capture(scope.model, ids, [HookPoint(layer) for layer in layers], attention_mask=mask)
    return {point.layer: one.float() for point, one in found.items()}


def of_dense(at: At[Sizes], model: str) -> dict[str, Any]:
    """What the dense model reads, which tokens count at each layer, and its residuals; made once for all kinds."""
    kept = at.folder / f"dense-{Path(model).name}.pt"
    if not kept.is_file():
        scope = opened(at, model, place(model))
        seen = scope.features(texts_of(model, at), layers=scope.layers)
        counts = {layer: seen.mask & (seen.reasons[layer] == 0) for layer in seen.layers}
        found = streams(scope, seen.input_ids, seen.mask, seen.layers)
        torch.save({"ids": seen.input_ids, "mask": seen.mask, "counts": counts, "residuals": found}, kept)
    return torch.load(kept)


def run(at: At[Sizes], model: str, kind: str) -> dict[str, Any]:
    out, where = at.folder / "written", place(model)
    dense = of_dense(at, model)
    shutil.rmtree(out, ignore_errors=True)
    if kind == "bfloat16":
        scope = opened(at, model, where, "bfloat16")
    elif kind.startswith("GGUF"):
        scope = opened(
            at, model, where.with_name(f"{where.name}.gguf"), "auto" if kind.endswith(" packed") else "float32"
        )
    else:
        scope = opened(at, model, written_by[kind](where, out))
    ids, mask = dense["ids"], dense["mask"]
    if scope.tokenize(texts_of(model, at)).input_ids.tolist() != ids.tolist():
        raise MismatchError(f"{kind} of {model} splits text differently")
    others, layers = streams(scope, ids, mask, [*dense["counts"]]), {}
    for layer, counts in dense["counts"].items():
        x, y = dense["residuals"][layer][counts], others[layer][counts]
        one, other = (scope.saes[layer].encode(residuals).to_dense() for residuals in (x, y))
        both = (one > 0) & (other > 0)
        layers[layer] = {
            "shared": float(both.sum() / (one > 0).sum()),
            "values": float(((other - one).abs() / one)[both].median()),
            "fvu": float((y - x).square().sum() / (x - x.mean(0)).square().sum()),
        }
    shutil.rmtree(out, ignore_errors=True)
    return {"layers": layers, "tokens": int(next(reversed(dense["counts"].values())).sum())}


def tell(at: At[Sizes], rows: Sequence[Row]) -> str:
    parts = [
        "Made by `python -m experiments.real.quantised --models lab,FOLDER --saes FOLDER --data FOLDER --write`.",
        paragraph(str(__doc__).split("\n\n")[-1]),
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        some = [row for row in rows if row["model"] == model]
        layers = list(some[0]["layers"])
        body = [
            (
                row["kind"],
                writer_of(row["kind"]),
                *(
                    f"{mean(one[key] for one in row['layers'].values()):.{2 if key == 'shared' else 3}g}"
                    for key in MEANS
                ),
                f"{row['layers'][layers[-1]]['shared']:.2g}",
            )
            for row in some
        ]
        name = "The bundled model" if model == "lab" else Path(model).name
        parts.append(paragraph(f"{name}, mean over layers {', '.join(layers)}; {some[0]['tokens']} tokens:"))
        parts.append(
            table(
                (
                    "kind",
                    "written by",
                    "features shared",
                    "difference of values",
                    "FVU of the residual",
                    "shared, last",
                ),
                body,
            )
        )
    return "\n\n".join(parts)


MEANS = ("shared", "values", "fvu")
experiment = Experiment(
    title=TITLE,
    varies={"model": (), "kind": (*DENSE, *KINDS)},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"kind": ("bfloat16", "MLX 4 bits")},
    quick_sizes=Sizes(texts=4),
    takes=lambda model, kind: model != "lab" or not kind.startswith("GGUF"),
    options={
        "saes": {"type": Path, "required": True, "help": "the folder of the real model's SAEs"},
        "data": {"type": Path, "required": True, "help": "the folder with xquad.jsonl.gz"},
    },
)

if __name__ == "__main__":
    main(experiment)
