"""Are features useful for few-label classification? Rules of features beside the usual classifiers on 113 datasets.

    python -m experiments.real.datasets --model FOLDER --sae FOLDER --probes WHEEL [--parts 0-9] [--write]

The binary datasets of sae-probes (Kantamneni et al. 2025), read from its wheel without its code (`pip download
--no-deps sae-probes`). Of each dataset as many texts of one class as of the other, drawn once, none twice, each cut to
`tokens` tokens. `DRAWS` times, three eighths of them are held out to test on and classifiers are fitted on `SEEDS`
labelled texts of each class from the others:

- rule: the features with the largest `Delta_f` joined by OR, as `qwen-scope classify` makes it (the wheel's second
  class, by the order of its names, is the positive one); of either class: the same, or the rule of the other class,
  whichever parts the labelled texts better;
- two weighted: logistic regression on how strongly the rule's own two features fire;
- sixteen weighted: the same on the features whose class means differ most (`qwen-scope classify fit --weighted`);
- features, most and mean: the same on all features, by their largest and by their mean activation in a text;
- logistic: logistic regression on mean residuals of the same layer; and TF-IDF of character n-grams.

So each step from the rule to the residual changes one thing: weights, more features, all features, pooling, and the
SAE. All see the tokens that count alone. A win or a loss is a difference in accuracy on the held-out texts of all draws
whose 95% interval, texts drawn anew, leaves out 0. Over datasets, families of datasets (`family`) are drawn anew.

Every third dataset comes first, so that a run which is stopped has seen all families; `--parts` names those that are
done.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.harness import At, Experiment, Row, main
from experiments.sections import paragraph, table
from qwen_scope import load_scope
from qwen_scope.analysis import Dataset, Labelled, Student, datasets_of, fit_rule, layer_differences, logistic
from qwen_scope.scope import ExtractOptions, Scope, parse_layers
from qwen_scope.score.probe_data import ProbeData
from qwen_scope.stats import ClusterSums, Interval, auroc
from qwen_scope.store import FeatureStore, Firings

PARTS, SEEDS, DRAWS = 113, (10, 50), 3
TOP, SPARSE, HELD = 2, 16, 3 / 8
OTHERS = {"rule of 1": 1, "rule of 5": 5, "rule of 10": 10}
RULES = ("rule", "either class", *OTHERS)
ON_FEATURES = ("two weighted", "sixteen weighted", "features, most", "features, mean")
PLAIN = ("logistic", "TF-IDF")
PAIRS = (
    ("rule", "logistic"), ("rule", "TF-IDF"), ("either class", "logistic"), ("sixteen weighted", "logistic"),
    ("sixteen weighted", "TF-IDF"), ("features, mean", "logistic"), ("features, mean", "TF-IDF"),
)  # fmt: skip
LADDER = ("rule", "two weighted", "sixteen weighted", "features, most", "features, mean", "logistic")
EXTREME = 5
TITLE = "Rules of features on 113 datasets"


@dataclass(frozen=True)
class Sizes:
    """Texts of each class, and tokens of a text that are read."""

    each: int = 80
    tokens: int = 64


@dataclass(frozen=True, eq=False)
class Texts:
    """One dataset as read: who fires where, mean residuals, and the tokens that count."""

    labelled: Labelled
    means: Mapping[int, Dataset]
    vectors: Mapping[int, np.ndarray]
    counted: tuple[str, ...]


def layers_of(at: At[Sizes]) -> list[int]:
    """The layers asked for; the first sentence speaks of the last of them."""
    return parse_layers(at.options["layers"]) or []


@cache
def scope_of(model: Path, sae: Path) -> Scope:
    return load_scope(str(model), str(sae), dtype="bfloat16")


@cache
def data_of(probes: Path) -> ProbeData:
    return ProbeData(probes)


def family(name: str) -> str:
    """Datasets that share texts or a task: phrases (`65_high-school` and the like), or those of the same first word."""
    number, _, rest = name.partition("_")
    if 65 <= int(number) <= 85:
        return "phrase"
    first = rest.partition("_")[0]
    return "wikidata" if first.startswith("wikidata") else first


def read(at: At[Sizes], name: str, folder: Path) -> Texts:
    """The drawn texts of a dataset through the model."""
    given, layers, data = at.options, layers_of(at), data_of(at.options["probes"]).read(name)
    first = {text: i for i, text in reversed(list(enumerate(data.texts))) if text.strip()}
    unique, rng = np.array(sorted(first.values())), np.random.default_rng(0)
    sides = [rng.permutation(unique[data.y[unique] == label])[: at.sizes.each] for label in (1, 0)]
    n = min(map(len, sides))
    rows = [{"text": data.texts[i], "label": int(data.y[i])} for side in sides for i in side[:n]]
    if not (folder / "manifest.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        scope = scope_of(given["model"], given["sae"])
        counted = [scope.counted[layer] for layer in layers][-1]  # measured once, the same for every dataset
        options = ExtractOptions(max_tokens=at.sizes.tokens, pool=("mean",), counted=counted)
        scope.extract(rows, folder, options, layers=layers).close()
    with FeatureStore(folder) as store:
        found = Firings.of(store, name)
        kept = [row - 1 for row in found.rows]
        means = {layer: Dataset.from_store(store, layer, "mean").take(kept) for layer in layers}
    labels = np.array([meta["label"] == 1 for meta in found.metas])
    counted = tuple("".join(tokens[found.counted.first :]) for tokens in found.tokens)
    return Texts(Labelled(datasets_of(found), labels), means, found.residuals, counted)


def run(at: At[Sizes], part: int) -> dict[str, Any]:
    """All ways on one dataset: for every draw and number of labelled texts, which held-out texts each gets right."""
    torch.set_num_threads(1)
    name = data_of(at.options["probes"]).names[part]
    folder = at.folder / "stores" / str(part)
    texts, draws = read(at, name, folder), []
    for draw in range(DRAWS):
        rest, test = texts.labelled.split(1 - HELD, draw)
        made: dict[str, Any] = {"test": test.tolist(), "found": {}}
        for n in SEEDS:
            rng, labels = np.random.default_rng(draw), texts.labelled.labels
            some = np.sort(np.concatenate([rng.permutation(rest[labels[rest] == side])[:n] for side in (True, False)]))
            for way, scores in scored(texts, some, test).items():
                right = (scores > 0) == labels[test]
                area = float(auroc(scores[labels[test]], scores[~labels[test]]))
                made["found"][f"{way}/{n}"] = ["".join(map(str, right.astype(int))), round(area, 4)]
        draws.append(made)
    shutil.rmtree(folder)
    return {"name": name, "texts": len(texts.counted), "draws": draws}


def scored(texts: Texts, some: np.ndarray, test: np.ndarray) -> dict[str, np.ndarray]:
    """By `way@layer` the scores of the held-out texts: above 0 is the positive class."""
    labels = texts.labelled.labels
    words = Student.fit([texts.counted[i] for i in some], labels[some])
    out = {"TF-IDF": words.scores([texts.counted[i] for i in test])}
    for layer, data in texts.labelled.layers.items():
        y = labels[some]
        seeds, opposite = (Labelled({layer: data.take(some)}, side) for side in (y, ~y))
        held = {layer: data.take(test)}
        rules = {"rule": TOP, **OTHERS}
        fitted = {way: fit_rule(seeds, k) for way, k in rules.items()}
        out |= {f"{way}@{layer}": rule.scores(held) for way, rule in fitted.items()}
        if layer_differences(opposite)[layer] > layer_differences(seeds)[layer]:
            # a text on which it does not fire is of the positive class, but an equal score is no side's
            out[f"either class@{layer}"] = 1e-9 - fit_rule(opposite, TOP).scores(held)
        else:
            out[f"either class@{layer}"] = out[f"rule@{layer}"]
        most, mean = (one.matrix(values=True).toarray() for one in (data, texts.means[layer]))
        own = [one.feature for one in fitted["rule"].features]
        out[f"sixteen weighted@{layer}"] = fit_rule(seeds, SPARSE, weighted=True).scores(held)
        for way, x in {
            "two weighted": most[:, own],
            "features, most": most,
            "features, mean": mean,
        }.items():
            out[f"{way}@{layer}"] = weighted(x[some], y, x[test], texts.vectors[layer].shape[1])
        out[f"logistic@{layer}"] = logistic(texts.vectors[layer][some], y, texts.vectors[layer][test])[1]
    return out


def weighted(x: np.ndarray, labels: np.ndarray, test: np.ndarray, most: int) -> np.ndarray:
    """Logistic regression on activations, scaled by one number: standardising makes rare features the longest ones.

    The number makes the mean squared length the number of columns, as standardising does, or `most`, that of the
    residual, where there are more columns: so the penalty weighs alike on every way.
    """
    from sklearn.linear_model import LogisticRegression

    mean = x.mean(0)
    length = np.sqrt(((x - mean) ** 2).sum(1).mean())
    scale = np.sqrt(min(x.shape[1], most)) / max(length, 1e-12)
    model = LogisticRegression(max_iter=2000).fit((x - mean) * scale, labels)
    return np.asarray(model.decision_function((test - mean) * scale), np.float64)


def sums(row: Row, way: str, n: int) -> np.ndarray:
    """`(texts, 2)`: per text, in how many draws it was tested, and in how many of them the way was right."""
    out = np.zeros((row["texts"], 2))
    for draw in row["draws"]:
        out[draw["test"], 0] += 1
        out[draw["test"], 1] += np.array(list(draw["found"][f"{way}/{n}"][0])) == "1"
    return out[out[:, 0] > 0]


def named(way: str, layer: int) -> str:
    return way if way == "TF-IDF" else f"{way}@{layer}"


def apart(row: Row, first: str, second: str, n: int) -> Interval:
    """Accuracy of one way less another's on one dataset, over its texts."""
    a, b = sums(row, first, n), sums(row, second, n)
    return ClusterSums({"n": a[:, 0], "d": a[:, 1] - b[:, 1]}).interval(lambda s: s["d"] / s["n"])


def over_sets(rows: Sequence[Row], values: Sequence[float]) -> Interval:
    """The mean over datasets with its interval over families of them."""
    names = [family(row["name"]) for row in rows]
    kinds = {kind: i for i, kind in enumerate(dict.fromkeys(names))}
    total, count = np.zeros(len(kinds)), np.zeros(len(kinds))
    for kind, value in zip(names, values, strict=True):
        total[kinds[kind]] += value
        count[kinds[kind]] += 1
    return ClusterSums({"v": total, "n": count}).interval(lambda s: s["v"] / s["n"])


def accuracy(row: Row, way: str, n: int) -> float:
    found = sums(row, way, n).sum(0)
    return float(found[1] / found[0])


def area(row: Row, way: str, n: int) -> float:
    return float(np.mean([draw["found"][f"{way}/{n}"][1] for draw in row["draws"]]))


def counts(rows: Sequence[Row], first: str, second: str, n: int) -> tuple[int, int, int, Interval]:
    """Wins, ties, losses of the first, and the mean difference over datasets."""
    found = [apart(row, first, second, n) for row in rows]
    wins, losses = sum(one.low > 0 for one in found), sum(one.high < 0 for one in found)
    return wins, len(found) - wins - losses, losses, over_sets(rows, [one.estimate for one in found])


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """The section of docs/results.md."""
    most, layers = SEEDS[-1], layers_of(at)
    columns = [(layer, n) for layer in layers for n in SEEDS]
    cells = [
        [way, *(f"{over_sets(rows, [accuracy(r, named(way, layer), n) for r in rows]):.3f}" for layer, n in columns)]
        for way in (*RULES, *ON_FEATURES, *PLAIN)
    ]
    areas = [
        [way, *(over_sets(rows, [area(r, named(way, layer), n) for r in rows]).estimate for layer, n in columns)]
        for way in (*RULES, *ON_FEATURES, *PLAIN)
    ]
    pairs = []
    for first, second in PAIRS:
        for layer, n in columns:
            wins, ties, losses, gap = counts(rows, named(first, layer), named(second, layer), n)
            pairs.append([f"{first} less {second}", layer, n, wins, ties, losses, f"{gap:+.3f}"])
    heads = [f"layer {layer}, {n} of each" for layer, n in columns]
    how = f"""`python -m experiments.real.datasets --model FOLDER --sae FOLDER --probes WHEEL --write`:
        {Path(at.options["model"]).name} with {Path(at.options["sae"]).name}; {len(rows)} of the {PARTS} binary datasets
        of sae-probes, at most {at.sizes.each} texts of each class of the first {at.sizes.tokens} tokens, of which
        {HELD:.0%} are held out, {DRAWS} draws; {most} labelled texts are at most all others. Accuracy on held-out
        texts (chance is 0.5), the mean over datasets with its 95% interval over {families(rows)} families of them.
        `rule` is the top {TOP} features joined by OR, of either class: of the class that the labelled texts part
        better."""
    about = """Wins, ties and losses by the 95% interval of each dataset: where there is no difference, one dataset in
        forty is a win and one a loss by chance. The last column is the mean difference over datasets."""
    return "\n\n".join(
        [
            paragraph(verdict(rows, layers[-1])),
            paragraph(how),
            table(("way", *heads), cells),
            paragraph(about),
            table(("ways", "layer", "labelled", "wins", "ties", "losses", "accuracy"), pairs),
            paragraph(extremes(rows, layers[-1])),
            paragraph("The area under the ROC curve, the mean over datasets, which does not depend on thresholds:"),
            table(("way", *heads), areas),
        ]
    )


def families(rows: Sequence[Row]) -> int:
    return len({family(row["name"]) for row in rows})


def verdict(rows: Sequence[Row], layer: int) -> str:
    """Whether the rule is useful here, and what its loss is of."""
    n, said = SEEDS[-1], []
    for way in ("rule", "features, mean"):
        for other in PLAIN:
            wins, ties, losses, gap = counts(rows, named(way, layer), named(other, layer), n)
            said.append(f"{way} against {other}: {wins} wins, {ties} ties, {losses} losses, {gap:+.3f}")
    steps = [
        f"{after} less {before} {counts(rows, named(after, layer), named(before, layer), n)[3]:+.3f}"
        for before, after in pairwise(LADDER)
    ]
    rule = counts(rows, named("rule", layer), named("logistic", layer), n)[3]
    features = counts(rows, named("features, mean", layer), named("logistic", layer), n)[3]
    useful = "are as accurate as" if rule.high >= 0 else "are less accurate than"
    whose = "of the rule, not of the features" if features.high >= 0 else "of the rule and of the features"
    loss = "" if rule.high >= 0 else f" The loss is {whose}."
    return f"""Rules of features {useful} logistic regression on residuals (layer {layer}, {n} labelled texts of each
        class; accuracy): {"; ".join(said)}.{loss} From the rule to the residual, one change at a time:
        {"; ".join(steps)}."""


def extremes(rows: Sequence[Row], layer: int) -> str:
    """The datasets on which the rule, and all features, do best and worst beside the residual."""
    n, parts = SEEDS[-1], []
    for way in ("rule", "features, mean"):
        gaps = {r["name"]: apart(r, named(way, layer), named("logistic", layer), n).estimate for r in rows}
        order = sorted(gaps, key=lambda name: -gaps[name])
        best, worst = (
            ", ".join(f"{name} {gaps[name]:+.2f}" for name in some) for some in (order[:EXTREME], order[-EXTREME:])
        )
        parts.append(f"{way} less logistic (layer {layer}, {n} of each) is largest on {best}; smallest on {worst}.")
    return " ".join(parts)


experiment = Experiment(
    title=TITLE,
    varies={"part": tuple(part for third in range(3) for part in range(third, PARTS, 3))},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"part": (20, 40)},
    quick_sizes=Sizes(each=40, tokens=32),
    options={
        "model": {"type": Path, "required": True, "help": "the folder of the model"},
        "sae": {"type": Path, "required": True, "help": "the folder of its SAEs"},
        "layers": {"default": "6,18", "help": "with SAEs; the first sentence is of the last (default: 6,18)"},
        "probes": {"type": Path, "required": True, "help": "the wheel or folder of sae-probes"},
    },
)

if __name__ == "__main__":
    main(experiment)
