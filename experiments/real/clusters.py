"""Do the features that fire group documents as people would, and better than words do?

    python -m experiments.real.clusters --model FOLDER --sae FOLDER --data FOLDER [--layers 6,18] [--write]

Documents whose groups are known: paragraphs of XQuAD by language (one paragraph in one language only), and documents
of a corpus by source (`--data` holds `xquad.jsonl.gz` and, in `corpus`, files `LANGUAGE.SOURCE.jsonl`, of which the
English ones are taken). As many groups as there are are asked for, of k-means on

- features: what `qwen-scope analyze clusters` groups by, at each layer;
- words: TF-IDF of words; characters: TF-IDF of character n-grams of 1 to 4, within words;
- residuals: mean residuals at the same layer, standardised;
- dealt: features again, every feature's firings dealt to documents at random.

All go through the same truncated singular value decomposition and k-means. What counts is the adjusted mutual
information with the known groups, 1 for the same groups and 0 for chance: the mean over `SEEDS` seeds of k-means. Its
interval is that of `RESAMPLES` random halves of the documents, whose spread is the standard error of the whole; a
bootstrap would take documents twice, which agree with themselves. Features less each other way: on the same halves.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import adjusted_mutual_info_score
from sklearn.preprocessing import normalize, scale

from experiments.harness import At, Experiment, Row, main
from experiments.sections import paragraph, table
from qwen_scope import load_scope
from qwen_scope.analysis import Dataset, best_grouping, dealt, directions, weights
from qwen_scope.scope import ExtractOptions
from qwen_scope.store import FeatureStore

SEEDS, RESAMPLES, TOKENS = 3, 300, 96
WAYS = ("features", "words", "characters", "residuals", "dealt")
SETS = ("languages", "sources")
CHOSEN = "Features less each other way, on the same halves, and how many groups `analyze clusters` makes by itself:"
TITLE = "Groups of documents on a real model"


@dataclass(frozen=True)
class Sizes:
    """Documents of each known group."""

    each: int = 25


def documents(at: At[Sizes], which: str) -> list[dict[str, str]]:
    """Texts with the group they are known to belong to."""
    data, rng, found = at.options["data"], random.Random(0), {}
    if which == "languages":
        with gzip.open(data / "xquad.jsonl.gz", "rt", encoding="utf-8") as file:
            for row in map(json.loads, file):
                found.setdefault(row["language"], {})[int(row["id"])] = row["text"].strip()
        names, order = sorted(found), rng.sample(sorted(found["en"]), len(found["en"]))
        ids = {name: order[i :: len(names)][: at.sizes.each] for i, name in enumerate(names)}  # no paragraph twice
        return [{"text": found[name][i], "group": name} for name in names for i in ids[name]]
    for path in sorted((data / "corpus").glob("en.*.jsonl")):
        texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
        long = [text for text in texts if len(text) >= 400]
        for text in rng.sample(long, min(len(long), at.sizes.each)):
            start = rng.randrange(0, max(1, len(text) - 400) // 2 + 1)  # not every page begins with its own title
            found.setdefault(path.name.split(".")[1], []).append(text[start : start + 400])
    return [{"text": text, "group": name} for name, texts in found.items() for text in texts]


def stored(at: At[Sizes], which: str) -> Path:
    """The documents as a store, made once for all layers."""
    folder = at.folder / "stores" / which
    if not (folder / "manifest.json").is_file():
        scope = load_scope(str(at.options["model"]), str(at.options["sae"]), dtype="bfloat16")
        options = ExtractOptions(max_tokens=TOKENS, pool=("mean",))
        scope.extract(documents(at, which), folder, options).close()
    return folder


def run(at: At[Sizes], set: str, layer: int) -> Mapping[str, Any]:
    """Every way on one set of documents, the ways without a model too: they are quick."""
    torch.set_num_threads(1)
    with FeatureStore(stored(at, set)) as store:
        data, means = Dataset.from_store(store, layer, "mean", texts=True), store.residuals(layer, "mean")
    truth = [one["group"] for one in documents(at, set)]
    texts = list(data.texts or ())  # cut as the model's, so that all see the same
    rows = {
        "features": weights(data),
        "words": TfidfVectorizer(sublinear_tf=True).fit_transform(texts),
        "characters": TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True).fit_transform(texts),
        "residuals": normalize(scale(means.astype(np.float64))),
        "dealt": weights(dealt(data, 0)),
    }
    n = len(dict.fromkeys(truth))
    groups = {
        way: [best_grouping(directions(x, seed), seed, (n,)).group for seed in range(SEEDS)] for way, x in rows.items()
    }
    own = best_grouping(directions(rows["features"], 0), 0)
    return {"documents": len(truth), "groups": n, "ami": measured(truth, groups), "own": own.n}


def measured(truth: Sequence[str], groups: Mapping[str, Sequence[np.ndarray]]) -> dict[str, Any]:
    """Per way the adjusted mutual information, and how much more features have, each with its 95% interval."""
    rng, labels = np.random.default_rng(0), np.unique(truth, return_inverse=True)[1]

    def of(way: str, items: np.ndarray) -> float:
        return float(np.mean([adjusted_mutual_info_score(labels[items], group[items]) for group in groups[way]]))

    everything = np.arange(len(labels))
    drawn = [rng.choice(len(labels), len(labels) // 2, replace=False) for _ in range(RESAMPLES)]
    resampled = {way: np.array([of(way, items) for items in drawn]) for way in groups}

    def interval(values: np.ndarray) -> list[float]:
        return [float(x) for x in np.quantile(values, [0.025, 0.975])]

    return {
        way: {
            "estimate": of(way, everything),
            "interval": interval(resampled[way]),
            "gain": of("features", everything) - of(way, everything),
            "gain_interval": interval(resampled["features"] - resampled[way]),
        }
        for way in groups
    }


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """The section of docs/results.md."""
    cells, gains = [], []
    for row in rows:
        ami = row["ami"]
        shown = [
            f"{ami[way]['estimate']:.3f} [{low:.3f}, {high:.3f}]"
            for way in WAYS
            for low, high in [ami[way]["interval"]]
        ]
        cells.append([row["set"], row["layer"], *shown])
        more = [
            f"{ami[way]['gain']:+.3f} [{low:+.3f}, {high:+.3f}]"
            for way in WAYS[1:]
            for low, high in [ami[way]["gain_interval"]]
        ]
        gains.append([row["set"], row["layer"], *more, row["own"]])
    sizes = ", ".join(
        f"{row['documents']} in {row['groups']} ({row['set']})" for row in {r["set"]: r for r in rows}.values()
    )
    ahead = sum(row["ami"][way]["gain_interval"][0] > 0 for row in rows for way in ("words", "characters", "residuals"))
    behind = sum(
        row["ami"][way]["gain_interval"][1] < 0 for row in rows for way in ("words", "characters", "residuals")
    )
    verdict = f"""Of {3 * len(rows)} comparisons with words, characters and residuals, features are ahead in {ahead} and
        behind in {behind}; the interval of the others holds 0."""
    how = f"""`python -m experiments.real.clusters --model FOLDER --sae FOLDER --data FOLDER --write`:
        {Path(at.options["model"]).name} with {Path(at.options["sae"]).name}; documents: {sizes}, the first {TOKENS}
        tokens of each. Adjusted mutual information with the known groups, of k-means with as many groups, the mean over
        {SEEDS} seeds of it, with the 95% interval over {RESAMPLES} random halves of the documents, the groups as they
        are. "Dealt" is the control: every feature's firings dealt to documents at random."""
    return "\n\n".join(
        [
            paragraph(verdict),
            paragraph(how),
            table(("groups", "layer", *WAYS), cells),
            paragraph(CHOSEN),
            table(("groups", "layer", *WAYS[1:], "chosen"), gains),
        ]
    )


experiment = Experiment(
    title=TITLE,
    varies={"set": SETS, "layer": (6, 18)},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"layer": (18,)},
    quick_sizes=Sizes(each=3),
    options={
        "model": {"type": Path, "required": True, "help": "the folder of the model"},
        "sae": {"type": Path, "required": True, "help": "the folder of its SAEs"},
        "data": {"type": Path, "required": True, "help": "the folder with xquad.jsonl.gz and corpus/"},
    },
)

if __name__ == "__main__":
    main(experiment)
