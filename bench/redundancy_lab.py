"""The report's claims about benchmarks, at lab scale: R-hat against R, overlap against performance similarity.

    qwen-scope lab panel -o out/panel
    python bench/redundancy_lab.py out/panel --write   # the section of docs/results.md; without it, every table
    python bench/redundancy_lab.py out/panel --layers 2,3,4,5 --json

Features are those of the bundled lab on the last token of every prompt. The overlap is computed without the benchmark
held fixed, `language` unless another is named: it needs what every model of the panel learns first.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from sections import paragraph, table, write_section

from qwen_scope import load_scope
from qwen_scope.analysis import Dataset, overlap_of, redundancy_of, subset_of
from qwen_scope.model import LoadedModel
from qwen_scope.scope import ExtractOptions, extract
from qwen_scope.text import Corpus

TITLE = "Benchmarks seen as features"
SHOWN = 4  # the layer whose table is shown in full
PUBLISHED = {"rho": "0.85", "direct, pearson": "0.68", "partial, pearson": "0.755", "direct, spearman": "0.61",
             "partial, spearman": "0.713"}  # fmt: skip


def stores(panel: Path, layers: list[int]) -> list[tuple[str, object]]:
    """The features of every benchmark, extracted once."""
    scope = load_scope("lab", device="cpu")
    loaded, saes = LoadedModel(scope.model, scope.tokenizer, "lab"), {layer: scope.saes[layer] for layer in layers}
    fingerprint = next(iter(saes.values())).identity.fingerprint[:8]
    where = panel / f"stores-{fingerprint}-{'-'.join(map(str, layers))}"
    return [
        (path.stem, extract(Corpus(path), loaded, saes, where / path.stem, ExtractOptions(max_tokens=512)))
        for path in sorted((panel / "benchmarks").glob("*.jsonl"))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("panel", type=Path)
    parser.add_argument("--layers", default="2,3,4,5")
    parser.add_argument("--general", default="language")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="into docs/results.md")
    given = parser.parse_args()
    layers = [int(layer) for layer in given.layers.split(",")]
    opened, out = stores(given.panel, layers), {}
    for layer in layers:
        datasets = [
            Dataset.from_store(store, layer, "last", name=name, scores=given.panel / "scores" / f"{name}.csv")
            for name, store in opened
        ]
        found = redundancy_of(datasets)
        overlap = overlap_of(datasets, general=given.general)
        subset = subset_of(datasets, share=0.9)
        out[str(layer)] = {"redundancy": found.data, "overlap": overlap.data, "subset": subset.data}
        if not given.json and not given.write:
            print(f"## Layer {layer}\n")
            for table in (*found.tables, *overlap.tables, *subset.tables):
                print(markdown(table))
    if given.json:
        print(json.dumps(out, indent=1))
    if given.write:
        write_section(TITLE, written(out, json.loads((given.panel / "panel.json").read_text()), given.general))


def reliability(panel: dict[str, Any], name: str, items: int) -> float:
    """The share of the variance of accuracy over the panel that is not the noise of having so few items.

    Accuracies of models that only guess differ by `p (1 - p) / items` on average, and the share is about 0.
    """
    accuracy = np.array(list(panel["accuracy"][name].values()))
    return float(1 - (accuracy * (1 - accuracy) / items).mean() / accuracy.var(ddof=1))


def interval(found: dict[str, float]) -> str:
    return f"{found['estimate']:.2f} ({found['low']:.2f}, {found['high']:.2f})"


def written(out: dict[str, Any], panel: dict[str, Any], general: str) -> str:
    """The section of docs/results.md."""
    pools = {one["name"]: one["pool"] for one in panel["benchmarks"]}
    shown = out[str(SHOWN)]["redundancy"]["datasets"]
    rely = {name: reliability(panel, name, one["items"]) for name, one in shown.items()}
    rows = []
    for name, one in sorted(shown.items(), key=lambda item: -item[1]["redundancy"]):
        accuracy = list(panel["accuracy"][name].values())
        cells = (name, one["items"], pools[name], one["footprint"], one["redundancy"], one["ranking"]["estimate"])
        rows.append((*cells, rely[name], f"{min(accuracy):.2f} to {max(accuracy):.2f}"))
    r = [one["ranking"]["estimate"] for one in shown.values()]
    tied = float(spearmanr(r, list(rely.values())).statistic)
    heads = ("benchmark", "items", "different prompts", "footprint", "R-hat", "R", "reliability", "accuracy")
    lines, best = [], -1.0
    for layer, found in out.items():
        agreement, scores = found["redundancy"]["agreement"], found["overlap"]["performance"]
        best = max(best, agreement["R-hat and R"]["estimate"])
        keys = [
            f"{way}, {kind}" for kind in ("pearson", "spearman") for way in ("direct", f"with {general} held fixed")
        ]
        lines.append((layer, interval(agreement["R-hat and R"]), *(interval(scores[key]) for key in keys)))
    names = ("direct, pearson", "partial, pearson", "direct, spearman", "partial, spearman")
    lines.append(("report", PUBLISHED["rho"], *(PUBLISHED[name] for name in names)))
    direct = [found["overlap"]["performance"]["direct, pearson"]["estimate"] for found in out.values()]
    clear = sum(found["overlap"]["performance"]["direct, pearson"]["low"] > 0 for found in out.values())
    zero = all(found["redundancy"]["agreement"]["R-hat and R"]["low"] <= 0 for found in out.values())
    pairs = next(iter(out[str(SHOWN)]["overlap"]["performance"].values()))["pairs"]
    intro = f"""`qwen-scope lab panel -o out/panel`, then `bench/redundancy_lab.py out/panel --write`:
    {len(panel["models"])} checkpoints (trainings of other mixtures, sizes and lengths, three checkpoints of each) and
    {len(shown)} multiple-choice benchmarks of the lab of {min(o["items"] for o in shown.values())} to
    {max(o["items"] for o in shown.values())} items, some of which ask few prompts again and again. Features are those
    of the bundled lab on the last token of the prompt; scores are whether the right one of four choices is the
    likeliest. R is the performance-based redundancy, R-hat that of features. Reliability: the share of the variance
    of accuracy
    over the panel that is not the noise of so few items. Layer {SHOWN}:"""
    middle = f"""Correlations with 95% intervals; over pairs of benchmarks the interval resamples benchmarks, and
    `{general}` is held fixed and left out of the pairs ({pairs} pairs)."""
    verdict = "is **not reproduced** here" if best < 0.7 else "is seen here too"
    end = f"""The report's claim about redundancy {verdict}: the largest correlation of R-hat with R is {best:.2f}
    {"and every interval holds 0" if zero else ""}. What R follows instead is the reliability of the scores
    (Spearman {tied:.2f}): where a panel of models only guesses, any subset ranks them by other noise than the whole,
    and R is low
    however often an item repeats another; where models differ much, R is high even for fifty different items. Features
    know nothing of that. So R-hat can stand for R only over benchmarks that tell the models apart equally well, which
    those of large models come closer to than these. Overlap goes with similar scores directly, at most
    {max(direct):.2f} (Pearson), with an interval above 0 at {clear} of {len(out)} layers; holding `{general}` fixed
    weakens it where the report's partial correlation was larger. `{general}` is no measure of general ability on this
    panel, and the benchmarks made of the same talks overlap by construction."""
    return "\n\n".join([
        paragraph(intro), table(heads, rows), paragraph(middle),
        table(("layer", "R-hat and R, Spearman", "overlap and scores, Pearson", "the same, partial", "Spearman",
               "the same, partial"), lines), paragraph(end),
    ])  # fmt: skip


def markdown(table) -> str:
    """A table as Markdown."""
    lines = [f"### {table.title}\n", "| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    for row in table.rows:
        cells = [f"{c:.3f}" if isinstance(c, float) else "" if c is None else str(c) for c in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
