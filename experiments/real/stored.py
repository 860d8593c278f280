"""What SAE weights lose when they are stored in 16 or 8 bits.

    python -m experiments.real.stored --model FOLDER --sae FOLDER --data FOLDER [--kinds a,b] [--write]

The SAEs are written by `save_sae` in each type and opened again; 8 bits are whole numbers with a scale per feature. On
the residuals of the same tokens (English paragraphs, those tokens that count), at each layer: the share of the features
active with the SAE as released that are active with the copy; the relative error of all activations; explained
variance; and, on the first texts, the next-token loss with the reconstruction in the residual's place, less that of the
SAE as released. Intervals are over texts, differences on the same draws.

SAEs whose files are bfloat16 already lose nothing there, so one in float32 is measured, too, where there is one.

The rule, written before the run: of the active features at least 99% stay in bfloat16 and 97% in int8 at every layer
(the lower end of the interval), and explained variance falls by at most 0.001 (the upper end).
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from experiments.harness import At, Experiment, Row, main
from experiments.sections import paragraph, table
from qwen_scope.model import HookPoint, capture, changing
from qwen_scope.sae import SAE, layers_of, load_sae, save_sae
from qwen_scope.scope import Scope, load_scope
from qwen_scope.stats import ClusterSums, Interval

TITLE = "SAE weights in 16 and 8 bits"
RELEASED = "as released"
KINDS = {RELEASED: None, "bfloat16": torch.bfloat16, "int8": torch.int8}
KEEPS, FALL = {"bfloat16": 0.99, "int8": 0.97}, 0.001
LONGEST = 256  # tokens of a text


@dataclass(frozen=True)
class Sizes:
    """Texts that are encoded, and how many of them are read on with reconstructions."""

    texts: int = 32
    spliced: int = 6


def texts_of(at: At[Sizes]) -> list[str]:
    with gzip.open(at.options["data"] / "xquad.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [row["text"] for row in map(json.loads, lines) if row["language"] == "en"]
    return rows[: at.sizes.texts]


def opened(at: At[Sizes]) -> Scope:
    return load_scope(str(at.options["model"]), str(at.options["sae"]), device="cpu", dtype="float32")


def read(at: At[Sizes]) -> dict[str, Any]:
    """Ids of each text, and by layer where tokens count `(texts, seq)` and the residuals of all; made once."""
    kept = at.folder / "residuals.pt"
    if not kept.is_file():
        scope = opened(at)
        seen = scope.features(texts_of(at), layers=scope.layers)
        counts = {layer: (seen.mask & (seen.reasons[layer] == 0))[:, :LONGEST] for layer in seen.layers}
        ids, mask = seen.input_ids[:, :LONGEST], seen.mask[:, :LONGEST]
        with torch.no_grad():
            found = [
                capture(scope.model, i[None, : int(m.sum())], [HookPoint(layer) for layer in counts])
                for i, m in zip(ids, mask, strict=True)
            ]
        residuals = {
            layer: [
                one[HookPoint(layer)][0][count[: int(m.sum())]]
                for one, count, m in zip(found, where, mask, strict=True)
            ]
            for layer, where in counts.items()
        }
        torch.save({"ids": ids, "mask": mask, "counts": counts, "residuals": residuals}, kept)
    return torch.load(kept)


@torch.no_grad()
def losses(scope: Scope, dense: Mapping[str, Any], texts: int, layer: int, sae: SAE | None) -> list[float]:
    """By text the sum of next-token losses, with the reconstruction where tokens count; of the bare model without."""

    def put(h: Tensor, _: Any, counts: Tensor) -> Tensor:
        return h if sae is None else torch.where(counts[None, :, None], sae.decode(sae.encode(h)).to(h), h)

    found = []
    for text in range(texts):
        own = dense["ids"][text][: int(dense["mask"][text].sum())]
        with changing(scope.model, {HookPoint(layer): partial(put, counts=dense["counts"][layer][text][: len(own)])}):
            logits = scope.model(own[None]).logits[0, :-1]
        found.append(float(cross_entropy(logits.float(), own[1:], reduction="sum")))
    return found


def run(at: At[Sizes], kind: str) -> dict[str, Any]:
    dense, source, out = read(at), str(at.options["sae"]), at.folder / "written"
    scope, layers = opened(at), {}
    for layer in layers_of(source):
        sae = load_sae(source, layer)
        shutil.rmtree(out, ignore_errors=True)
        save_sae(sae, out, "safetensors", KINDS[kind])
        size = (out / f"layer{layer}.sae.safetensors").stat().st_size
        copy = load_sae(out, layer)
        residuals = dense["residuals"][layer]
        mean = torch.cat(residuals).double().mean(0)
        sums = []
        for x in residuals:
            ours, theirs = sae.encode(x), copy.encode(x)
            one, other = ours.to_dense(), theirs.to_dense()
            gap = (x - copy.decode(theirs)).double().square().sum()
            both, active = ((one > 0) & (other > 0)).sum(), (one > 0).sum()
            far = [float((other - one).double().square().sum()), float(one.double().square().sum())]
            sums.append([float(gap), float((x - mean).double().square().sum()), int(both), int(active), *far])
        lost = losses(scope, dense, at.sizes.spliced, layer, copy)
        layers[layer] = {"bytes": size, "sums": sums, "losses": lost}
    shutil.rmtree(out, ignore_errors=True)
    tokens = [int(mask.sum()) - 1 for mask in dense["mask"][: at.sizes.spliced]]
    counted = sum(map(len, next(iter(dense["residuals"].values()))))
    return {"layers": layers, "tokens": tokens, "counted": counted}


def figures(released: Mapping[str, Any], copy: Mapping[str, Any], tokens: Sequence[int]) -> dict[str, Interval]:
    """Shares and differences of one layer."""
    gap, spread, both, active, far, length = np.array(copy["sums"], float).T
    own = np.array(released["sums"], float).T[0]
    sums = ClusterSums(
        {"gap": gap, "own": own, "spread": spread, "both": both, "active": active, "far": far, "length": length}
    )
    lost = {"copy": np.array(copy["losses"]), "own": np.array(released["losses"]), "tokens": np.array(tokens, float)}
    return {
        "kept": sums.interval(lambda s: s["both"] / s["active"]),
        "values": sums.interval(lambda s: np.sqrt(s["far"] / s["length"])),
        "ev": sums.interval(lambda s: 1 - s["gap"] / s["spread"]),
        "fall": sums.interval(lambda s: (s["gap"] - s["own"]) / s["spread"]),
        "loss": ClusterSums(lost).interval(lambda s: (s["copy"] - s["own"]) / s["tokens"]),
    }


def tell(at: At[Sizes], rows: Sequence[Row]) -> str:
    by_kind = {row["kind"]: row for row in rows}
    if RELEASED not in by_kind:
        return f"Nothing to compare with: run it with --kinds '{RELEASED},{','.join(by_kind)}'."
    released = by_kind[RELEASED]
    body, missed = [], []
    for layer, own in released["layers"].items():
        for kind, row in by_kind.items():
            one = row["layers"][layer]
            found = figures(own, one, row["tokens"])
            size = f"{one['bytes'] / 1e6:.2f}"
            if kind == RELEASED:
                body.append((layer, kind, size, "", "", f"{found['ev'].estimate:.4f}", "", ""))
                continue
            if found["kept"].low < KEEPS.get(kind, 0):
                missed.append(f"{kind} keeps {found['kept'].low:.3f} at layer {layer}, {KEEPS[kind]} wanted")
            if kind in KEEPS and found["fall"].high > FALL:
                missed.append(f"explained variance falls by {found['fall'].high:.4f} with {kind} at layer {layer}")
            values, fall, loss = f"{found['values']:.4f}", f"{found['fall']:.5f}", f"{found['loss']:.4f}"
            ev = f"{found['ev'].estimate:.4f}"
            body.append((layer, kind, size, f"{found['kept']:.4f}", values, ev, fall, loss))
    verdict = f"The rule does not hold: {'; '.join(missed)}." if missed else "The rule holds at every layer."
    words = (
        f"{verdict} Made by `python -m experiments.real.stored --model FOLDER --sae FOLDER --data FOLDER --write` from"
        f" {Path(at.options['sae']).name} on {Path(at.options['model']).name}: {released['counted']:,} tokens that"
        f" count of {at.sizes.texts} texts, the loss on {sum(released['tokens']):,} tokens of {at.sizes.spliced}."
    )
    columns = (
        "layer", "stored as", "MB", "active features that stay", "error of activations", "explained variance",
        "its fall", "rise of the loss, nats",
    )  # fmt: skip
    return "\n\n".join(
        [
            paragraph(words),
            *(paragraph(part) for part in str(__doc__).split("\n\n")[2:]),
            table(columns, body),
        ]
    )


experiment = Experiment(
    title=TITLE,
    varies={"kind": tuple(KINDS)},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"kind": (RELEASED, "int8")},
    quick_sizes=Sizes(texts=4, spliced=2),
    variant=lambda at: Path(at.options["sae"]).name,
    options={
        "model": {"type": Path, "required": True, "help": "the language model"},
        "sae": {"type": Path, "required": True, "help": "the folder of its SAEs"},
        "data": {"type": Path, "required": True, "help": "the folder with xquad.jsonl.gz"},
    },
)

if __name__ == "__main__":
    main(experiment)
