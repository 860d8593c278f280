"""The report's claims about benchmarks, at lab scale: R-hat against R, overlap against performance similarity.

    qwen-scope lab panel -o out/panel
    python bench/redundancy_lab.py out/panel           # tables for docs/results.md on standard output
    python bench/redundancy_lab.py out/panel --layers 2,3,4,5 --json

Features are those of the bundled lab on the last token of every prompt. The overlap is computed without the benchmark
held fixed, `language` unless another is named: it needs what every model of the panel learns first.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qwen_scope import load_scope
from qwen_scope.analysis import Dataset, overlap_of, redundancy_of, subset_of
from qwen_scope.corpus import Corpus, ExtractOptions, extract
from qwen_scope.model import LoadedModel


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
        if not given.json:
            print(f"## Layer {layer}\n")
            for table in (*found.tables, *overlap.tables, *subset.tables):
                print(markdown(table))
    if given.json:
        print(json.dumps(out, indent=1))


def markdown(table) -> str:
    """A table as Markdown."""
    lines = [f"### {table.title}\n", "| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    for row in table.rows:
        cells = [f"{c:.3f}" if isinstance(c, float) else "" if c is None else str(c) for c in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
