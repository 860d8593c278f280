"""The report's claims about benchmarks, at lab scale: R-hat against R, overlap against performance similarity.

    qwen-scope lab panel -o out/panel
    python -m experiments.lab.redundancy --panel out/panel [--layers 2,3,4,5] [--write]

Features are those of the bundled lab on the last token of every prompt. The overlap is computed without the benchmark
held fixed, `language` unless another is named: it needs what every model of the panel learns first.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from experiments.harness import At, Experiment, Row, main
from experiments.lab.bundled import lab
from experiments.sections import paragraph, table
from qwen_scope import FeatureStore
from qwen_scope.analysis import Dataset, overlap_of, redundancy_of, subset_of
from qwen_scope.model import LoadedModel
from qwen_scope.scope import ExtractOptions, extract
from qwen_scope.text import Corpus

TITLE = "Benchmarks seen as features"
SHOWN = 4  # the layer whose table is shown in full
PUBLISHED = {"rho": "0.85", "direct, pearson": "0.68", "partial, pearson": "0.755", "direct, spearman": "0.61",
             "partial, spearman": "0.713"}  # fmt: skip


@cache
def stores(panel: Path, layers: tuple[int, ...]) -> list[tuple[str, FeatureStore]]:
    """The features of every benchmark, extracted once."""
    scope = lab()
    loaded, saes = LoadedModel(scope.model, scope.tokenizer, "lab"), {layer: scope.saes[layer] for layer in layers}
    fingerprint = next(iter(saes.values())).identity.fingerprint[:8]
    where = panel / f"stores-{fingerprint}-{'-'.join(map(str, layers))}"
    return [
        (path.stem, extract(Corpus(path), loaded, saes, where / path.stem, ExtractOptions(max_tokens=512)))
        for path in sorted((panel / "benchmarks").glob("*.jsonl"))
    ]


def run(at: At[None], layer: int) -> dict[str, Any]:
    """The three analyses of one layer."""
    panel = at.options["panel"]
    datasets = [
        Dataset.from_store(store, layer, "last", name=name, scores=panel / "scores" / f"{name}.csv")
        for name, store in stores(panel, at.levels["layer"])
    ]
    return {
        "redundancy": redundancy_of(datasets).data,
        "overlap": overlap_of(datasets, general=at.options["general"]).data,
        "subset": subset_of(datasets, share=0.9).data,
    }


def reliability(panel: dict[str, Any], name: str, items: int) -> float:
    """The share of the variance of accuracy over the panel that is not the noise of having so few items.

    Accuracies of models that only guess differ by `p (1 - p) / items` on average, and the share is about 0.
    """
    accuracy = np.array(list(panel["accuracy"][name].values()))
    return float(1 - (accuracy * (1 - accuracy) / items).mean() / accuracy.var(ddof=1))


def interval(found: dict[str, float]) -> str:
    return f"{found['estimate']:.2f} ({found['low']:.2f}, {found['high']:.2f})"


def tell(at: At[None], measured: list[Row]) -> str:
    """The section of docs/results.md."""
    out = {row["layer"]: row for row in measured}
    panel = json.loads((at.options["panel"] / "panel.json").read_text(encoding="utf-8"))
    general = at.options["general"]
    pools = {one["name"]: one["pool"] for one in panel["benchmarks"]}
    shown = out[SHOWN if SHOWN in out else min(out)]["redundancy"]["datasets"]
    rely = {name: reliability(panel, name, one["items"]) for name, one in shown.items()}
    rows = []
    for name, one in sorted(shown.items(), key=lambda item: -item[1]["redundancy"]):
        accuracy = list(panel["accuracy"][name].values())
        cells = (name, one["items"], pools[name], one["footprint"], one["redundancy"], one["ranking"]["estimate"])
        rows.append((*cells, rely[name], f"{min(accuracy):.2f} to {max(accuracy):.2f}"))
    r = [one["ranking"]["estimate"] for one in shown.values()]
    tied, _ = map(float, spearmanr(r, list(rely.values())))
    heads = ("benchmark", "items", "distinct prompts", "footprint", "R-hat", "R", "reliability", "accuracy")
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
    pairs = next(iter(out[min(out)]["overlap"]["performance"].values()))["pairs"]
    intro = f"""`qwen-scope lab panel -o out/panel`, then `python -m experiments.lab.redundancy --panel out/panel
        --write`: {len(panel["models"])} checkpoints (trainings with other mixtures, sizes and lengths, three
        checkpoints of each) and {len(shown)} multiple-choice benchmarks of the lab with
        {min(o["items"] for o in shown.values())} to {max(o["items"] for o in shown.values())} items, some of which
        repeat few prompts. Features are those of the bundled lab at the last token of the prompt; an item is right if
        the correct one of four choices has the highest probability. R is the performance-based redundancy, R-hat the
        feature-based one. Reliability: the share of the variance of accuracy over the panel that is not sampling
        noise of the items. Layer {SHOWN}:"""
    middle = f"""Correlations with 95% intervals; over pairs of benchmarks the interval resamples benchmarks, and
        `{general}` is held fixed and left out of the pairs ({pairs} pairs)."""
    verdict = "is **not reproduced** here" if best < 0.7 else "is reproduced here"
    end = f"""The report's claim about redundancy {verdict}: the largest correlation of R-hat with R is
        {best:.2f}{", and every interval includes 0" if zero else ""}. R follows the reliability of the scores instead
        (Spearman {tied:.2f}): where the models of a panel only guess, any subset ranks them by other noise than the
        whole, and R is low however often items repeat; where models differ much, R is high even for fifty different
        items. Features carry no information about that. So R-hat can replace R only over benchmarks that separate the
        models equally well, which is closer to true of benchmarks for large models. Overlap correlates with
        similarity of scores directly, at most {max(direct):.2f} (Pearson), with an interval above 0 at {clear} of
        {len(out)} layers; holding `{general}` fixed weakens the correlation, whereas the report's partial correlation
        was larger. `{general}` does not measure general ability on this panel, and benchmarks made of the same talks
        overlap by construction."""
    return "\n\n".join([
        paragraph(intro), table(heads, rows), paragraph(middle),
        table(("layer", "R-hat and R, Spearman", "overlap and scores, Pearson", "the same, partial", "Spearman",
               "the same, partial"), lines), paragraph(end),
    ])  # fmt: skip


experiment = Experiment(
    title=TITLE,
    varies={"layer": (2, 3, 4, 5)},
    run=run,
    tell=tell,
    sizes=None,
    quick={"layer": (SHOWN,)},
    quick_sizes=None,
    options={
        "panel": {"type": Path, "required": True, "help": "the folder that `qwen-scope lab panel` made"},
        "general": {"default": "language", "help": "the benchmark held fixed"},
    },
)

if __name__ == "__main__":
    main(experiment)
