"""Hate speech from few labelled texts on a real model: rules of features beside the usual classifiers.

    python -m experiments.real.hatecheck --model FOLDER --sae FOLDER --data FOLDER [--languages en,de] [--write]

The protocol is that of the Qwen-Scope report (section 5) on HateCheck and Multilingual HateCheck
(`hatecheck.jsonl.gz` in `--data`; offensive by purpose, for measuring detectors only): of each language as many hateful
texts as others, half of each for labelled texts and half to test on, drawn by the seed. Rules are fitted on 10, 50, 200
or all labelled texts of each class: `Delta_f`, the top K features of the layer with the largest top-1 difference joined
by OR, or the best feature of each of several layers. The English rule is also used unchanged on the other languages.

Beside it, from the same texts: features of one layer with weights (`qwen-scope classify fit --weighted`), logistic
regression and a difference of means on mean residuals (the layer by cross-validation on at most 200 labelled texts of a
class), TF-IDF of character n-grams with logistic regression on the tokens that count, and a student distilled from the
rule's own labels of the labelled texts, which needs no language model. All of them see the tokens that count alone.
HateCheck's texts are made from templates, which labelled texts and test texts share, so figures say how well methods do
beside each other, not how well on hate in the wild.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.harness import At, Experiment, Row, main
from experiments.sections import paragraph, table
from qwen_scope import load_scope
from qwen_scope.analysis import (
    Labelled,
    Student,
    best_layer,
    datasets_of,
    fit_rule,
    layer_differences,
    logistic,
    mean_difference,
)
from qwen_scope.scope import ExtractOptions
from qwen_scope.stats import bootstrap
from qwen_scope.store import FeatureStore, Firings

TOPS, SEVERAL, ALL, FEW = (1, 2, 5, 10), (2, 3), 0, 200
STEPS = (10, 50, 200, ALL)
RULES = (*(f"K={k}" for k in TOPS), *(f"{m} layers" for m in SEVERAL))
WEIGHTED = {f"{k} weighted": k for k in (16, 64, 256)}
BASELINES = ("logistic", "means", "TF-IDF")
SHOWN = "K=2"  # whose errors are told by functionality, and whose labels teach the student
ENGLISH = "en"
LANGUAGES = ("en", "de", "es", "fr", "ar", "zh")
TITLE = "Hate speech from few labelled texts on a real model"


@dataclass(frozen=True)
class Sizes:
    """Texts of a class that are used at most; half of them are labelled ones."""

    each: int = 1000


@dataclass(frozen=True, eq=False)
class Texts:
    """The texts of a language, their firings and mean residuals."""

    labelled: Labelled
    vectors: Mapping[int, np.ndarray]
    counted: tuple[str, ...]  # of each text the tokens that count by their place
    functionality: tuple[str, ...]

    def take(self, items: np.ndarray) -> Texts:
        return Texts(
            self.labelled.take(items),
            {layer: x[items] for layer, x in self.vectors.items()},
            tuple(self.counted[i] for i in items),
            tuple(self.functionality[i] for i in items),
        )


def rows_of(at: At[Sizes], language: str) -> list[dict[str, Any]]:
    """As many hateful texts as others, drawn once."""
    with gzip.open(at.options["data"] / "hatecheck.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["language"] == language and row["text"].strip()]
    rng, some = np.random.default_rng(0), []
    sides = [[row for row in rows if bool(row["hateful"]) is label] for label in (True, False)]
    n = min(at.options.get("each") or at.sizes.each, *map(len, sides))
    for side in sides:
        some += [side[i] for i in np.sort(rng.permutation(len(side))[:n])]
    return some


@cache
def read(model: Path, sae: Path, folder: Path, rows: tuple[str, ...]) -> Texts:
    """The texts through the model, kept as a store."""
    place = folder / "store"
    if not (place / "manifest.json").is_file():
        scope = load_scope(str(model), str(sae), dtype="bfloat16")
        scope.extract([json.loads(row) for row in rows], place, ExtractOptions(pool=("mean",))).close()
    with FeatureStore(place) as store:
        firings = Firings.of(store, "texts")
    labels = np.array([bool(meta["hateful"]) for meta in firings.metas])
    first = firings.counted.first
    counted = tuple("".join(tokens[first:]) for tokens in firings.tokens)
    kinds = tuple(str(meta["functionality"]) for meta in firings.metas)
    return Texts(Labelled(datasets_of(firings), labels), firings.residuals, counted, kinds)


def texts_of(at: At[Sizes], language: str) -> Texts:
    rows = tuple(json.dumps(row, sort_keys=True) for row in rows_of(at, language))
    return read(at.options["model"], at.options["sae"], at.folder / language, rows)


def halves(texts: Texts, seed: int) -> tuple[Texts, Texts]:
    """Labelled texts and test texts."""
    first, second = texts.labelled.split(0.5, seed)
    return texts.take(first), texts.take(second)


def few(seeds: Texts, n: int, seed: int) -> Texts:
    """`n` labelled texts of each class, or all."""
    if n == ALL:
        return seeds
    rng, labels = np.random.default_rng(seed), seeds.labelled.labels
    chosen = [rng.permutation(np.flatnonzero(labels == label))[:n] for label in (True, False)]
    return seeds.take(np.sort(np.concatenate(chosen)))


def run(at: At[Sizes], language: str, seed: int) -> Mapping[str, Any]:
    """All rules and baselines of one language and split, and those of English on its test texts."""
    torch.set_num_threads(1)
    seeds, test = halves(texts_of(at, language), seed)
    result: dict[str, Any] = {"texts": len(test.labelled), "layers": layer_differences(seeds.labelled)}
    truth = test.labelled.labels
    for n in STEPS:
        if n == ALL or n <= int(seeds.labelled.labels.sum()):
            found = decided(few(seeds, n, seed), test)
            result[str(n)] = {way: f1_of(called, truth) for way, called in found.items()}
    called = decided(seeds, test)[SHOWN]
    kinds = np.array(test.functionality)
    result["kinds"] = {
        kind: [int(called[kinds == kind].sum()), int((kinds == kind).sum())] for kind in sorted(set(kinds))
    }
    rule = fit_rule(seeds.labelled, TOPS[1])
    result["rule"] = [[one.layer, one.feature, one.delta] for one in rule.features]
    student = Student.fit(seeds.counted, rule.decide(seeds.labelled.layers))
    found = student.predict(test.counted)
    result["student"] = {"f1": f1_of(found, truth), "agrees": float((found == called).mean())}
    if language != ENGLISH:
        foreign = halves(texts_of(at, ENGLISH), seed)[0]
        result["english"] = {way: f1_of(called, truth) for way, called in decided(foreign, test).items()}
    return result


def decided(seeds: Texts, test: Texts) -> dict[str, np.ndarray]:
    """What each way calls hateful of the test texts."""
    some, labels = seeds.labelled, seeds.labelled.labels
    out = {f"K={k}": fit_rule(some, k).decide(test.labelled.layers) for k in TOPS}
    for several in SEVERAL:
        if several <= len(some.layers):
            out[f"{several} layers"] = fit_rule(some, several=several).decide(test.labelled.layers)
    for way, k in WEIGHTED.items():
        out[way] = fit_rule(some, k, weighted=True).decide(test.labelled.layers)
    small = few(seeds, FEW, 0) if int(labels.sum()) > FEW else seeds
    layer = best_layer(small.vectors, small.labelled.labels)
    out["logistic"] = logistic(seeds.vectors[layer], labels, test.vectors[layer])[0]
    out["means"] = mean_difference(seeds.vectors[layer], labels, test.vectors[layer])[0]
    out["TF-IDF"] = Student.fit(seeds.counted, labels).predict(test.counted)
    return out


def f1_of(called: np.ndarray, truth: np.ndarray) -> float:
    return float(2 * (called & truth).sum() / max(1, called.sum() + truth.sum()))


def over_seeds(values: Sequence[float]) -> str:
    """The mean with its interval over splits."""
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else ""
    return f"{bootstrap(np.array(values)):.3f}"


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """The section of docs/results.md."""
    languages = list(dict.fromkeys(row["language"] for row in rows))
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    here = {language: [row for row in rows if row["language"] == language] for language in languages}
    how = f"""`python -m experiments.real.hatecheck --model FOLDER --sae FOLDER --data FOLDER --write`:
        {Path(at.options["model"]).name} with {Path(at.options["sae"]).name}, layers
        {", ".join(rows[0]["layers"])}; at most {at.options.get("each") or at.sizes.each} texts of a class and language,
        half of them labelled. F1 on held-out texts, as many hateful ones as others (calling all hateful gives
        0.667), the mean over {len(seeds)} splits with its 95% interval over them. K: features of one layer joined by
        OR; "layers": the best of each of several; "weighted": so many features of one layer with weights (`qwen-scope
        classify fit --weighted`), which the report does not have. The student learnt from the labels of the rule
        {SHOWN} from all labelled texts. Labelled texts and test texts share HateCheck's templates."""
    parts = [paragraph(verdict(here)), paragraph(how)]
    for language in languages:
        some = here[language]
        steps = [str(n) for n in STEPS if all(str(n) in row for row in some)]
        cells = [
            [way, *(over_seeds([row[n][way] for row in some]) for n in steps)]
            for way in (*RULES, *WEIGHTED, *BASELINES)
            if way in some[0]["0"]
        ]
        cells.append(["student", *[""] * (len(steps) - 1), over_seeds([row["student"]["f1"] for row in some])])
        if language != ENGLISH:
            for line in cells[:-1]:
                line.append(over_seeds([row["english"][line[0]] for row in some]))
            cells[-1].append("")
        columns = [
            "way",
            *("all" if n == "0" else n for n in steps),
            *(["all English ones"] if language != ENGLISH else []),
        ]
        agree = over_seeds([row["student"]["agrees"] for row in some])
        about = f"""{language}: {some[0]["texts"]} test texts, labelled texts of each class above the columns; the
            student agrees with the rule on {agree}."""
        parts += [
            paragraph(about),
            table(columns, cells),
        ]
    return "\n\n".join([*parts, paragraph(BY_KIND), by_kind(here)])


BY_KIND = f"""Share called hateful by the rule {SHOWN} from all labelled texts, by HateCheck's functionality (those that
    end in `_nh` are not hateful), over all splits."""


def by_kind(here: Mapping[str, list[Row]]) -> str:
    """One line per functionality, the languages side by side."""
    kinds = sorted({kind for rows in here.values() for row in rows for kind in row["kinds"]})

    def share(rows: list[Row], kind: str) -> str:
        found = np.array([row["kinds"].get(kind, [0, 0]) for row in rows]).sum(0)
        return f"{found[0] / found[1]:.2f} of {found[1]}" if found[1] else ""

    return table(["functionality", *here], [[kind, *(share(rows, kind) for rows in here.values())] for kind in kinds])


def verdict(here: Mapping[str, list[Row]]) -> str:
    """What the figures say of the report's claim, first."""
    said = []
    for language, rows in here.items():
        best, heavy, other = (
            max(ways, key=lambda way: np.mean([row["0"].get(way, 0) for row in rows]))
            for ways in (RULES, WEIGHTED, BASELINES)
        )
        told = {
            way: f"{over_seeds([row['0'][way] for row in rows])}, less {other}"
            f" {over_seeds([row['0'][way] - row['0'][other] for row in rows])}"
            for way in (best, heavy)
        }
        said.append(f"{language}: the best rule ({best}) {told[best]}; {heavy} {told[heavy]}")
    reached = all(max(np.mean([row["0"].get(way, 0) for row in rows]) for way in RULES) > 0.9 for rows in here.values())
    claim = "This shows" if reached else "This does not show"
    return f"""{claim} the report's F1 above 0.90 from rules of features in every language here. From all labelled
        texts, the best rule, features with weights and classifier of each language by these test texts.
        {". ".join(said)}."""


experiment = Experiment(
    title=TITLE,
    varies={"language": LANGUAGES, "seed": (1, 2, 3)},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"language": ("en",), "seed": (1, 2)},
    quick_sizes=Sizes(each=60),
    options={
        "model": {"type": Path, "required": True, "help": "the folder of the model"},
        "sae": {"type": Path, "required": True, "help": "the folder of its SAEs"},
        "data": {"type": Path, "required": True, "help": "the folder with hatecheck.jsonl.gz"},
        "each": {"type": int, "help": "texts of a class and language that are used at most"},
        "apart": {"metavar": "NAME", "help": "a section of its own, such as of another model"},
    },
    variant=lambda at: at.options["apart"] or "",
)

if __name__ == "__main__":
    main(experiment)
