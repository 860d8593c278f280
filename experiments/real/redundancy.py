"""How much a benchmark repeats itself by the features of a real model, with duplicates planted as the check.

    python -m experiments.real.redundancy --model FOLDER --sae FOLDER --data FOLDER [--probes WHEEL] [--write]

R-hat of the Qwen-Scope report (section 4) of GSM8K's questions and of HateCheck's English texts (`gsm8k_test.jsonl.gz`
and `hatecheck.jsonl.gz` in `--data`), from the features that fire on the last token, and from those that fire on any
token. R, from the scores of several
models, is not measured: models of this size solve next to none of the problems, so a ranking of them would be noise.

R-hat grows with the number of items, so benchmarks are compared at `items` each, over `DRAWS` random subsets. The
check: of `items`, a share `SHARES` is replaced by copies of the others, each of one drawn at random, and R-hat has to
grow with the share. Beside features: the same formula on words in the place of features, and on features whose firings
are dealt to items at random, which keeps how often each fires and takes away what goes together.

With `--probes`, the wheel of sae-probes (`pip download --no-deps sae-probes`), the same at the middle layer of one
dataset of every family: the first by number that has as many different texts as are read. `Sizes.few` texts, in
subsets of `Sizes.few_items`, without copies and with a share `COPIED` of them.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from experiments.harness import At, Experiment, Row, main
from experiments.real.datasets import data_of, family, scope_of
from experiments.sections import paragraph, table
from qwen_scope.analysis import Dataset, dealt, expected_coverage
from qwen_scope.scope import ExtractOptions
from qwen_scope.stats import bootstrap, correlation
from qwen_scope.store import FeatureStore

READ: Mapping[Literal["last", "any"], str] = {"last": "the last token", "any": "any token"}
REDUCTIONS = tuple(READ)
SETS, WAYS = ("gsm8k", "hatecheck"), ("features", "words", "dealt")
SHARES, DRAWS, TOKENS = (0.0, 0.1, 0.25, 0.5, 0.75), 40, 192
FEW_TOKENS, COPIED = 64, 0.5
TITLE = "Redundancy of benchmarks on a real model"


@dataclass(frozen=True)
class Sizes:
    """Items of a benchmark, in every subset; and texts that are read of each. `few` are those of sae-probes' sets."""

    items: int = 500
    texts: int = 1319
    few_items: int = 250
    few: int = 300


def texts_of(at: At[Sizes], name: str) -> list[str]:
    """The items of a benchmark, all or as many drawn at random, each text once."""
    file, column = {"gsm8k": ("gsm8k_test", "question"), "hatecheck": ("hatecheck", "text")}[name]
    with gzip.open(at.options["data"] / f"{file}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if row.get("language", "en") == "en"]
    texts = list(dict.fromkeys(row[column].strip() for row in rows if row[column].strip()))
    some = np.random.default_rng(0).permutation(len(texts))[: at.sizes.texts]
    return [texts[i] for i in np.sort(some)]


def stored(at: At[Sizes], name: str, texts: list[str], options: ExtractOptions, layers: list[int] | None) -> Path:
    """Texts as a store, made once."""
    folder = at.folder / "stores" / name
    if not (folder / "manifest.json").is_file():
        scope = scope_of(at.options["model"], at.options["sae"])
        scope.extract([{"text": text} for text in texts], folder, options, layers=layers).close()
    return folder


def redundancy(counts: np.ndarray, items: int) -> float:
    return expected_coverage(counts, items).redundancy


def matrix(data: Dataset) -> np.ndarray:
    """Which features fire on which items, `(items, features)` bool, of those that fire anywhere."""
    names, columns = np.unique(data.feature, return_inverse=True)
    out = np.zeros((len(data), len(names)), bool)
    out[data.item, columns] = True
    return out


def words(texts: list[str]) -> np.ndarray:
    """Which words stand in which texts, `(items, words)` bool."""
    found = [set(re.findall(r"\w+", text.lower())) for text in texts]
    place = {word: i for i, word in enumerate(sorted(set().union(*found)))}
    out = np.zeros((len(texts), len(place)), bool)
    for item, some in enumerate(found):
        out[item, [place[word] for word in some]] = True
    return out


def with_copies(chosen: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """The chosen items, a share of them replaced by copies of the others."""
    copies = round(share * len(chosen))
    kept = chosen[: len(chosen) - copies]
    return np.concatenate([kept, rng.choice(kept, copies)])


def run(at: At[Sizes], reduction: Literal["last", "any"], set: str, layer: int) -> Mapping[str, Any]:
    """R-hat of random subsets by way and share of copies, and of the whole."""
    torch.set_num_threads(1)
    texts, sizes = texts_of(at, set), at.sizes
    with FeatureStore(stored(at, set, texts, ExtractOptions(max_tokens=TOKENS), None)) as store:
        fires = firings(store, layer, reduction, texts)
    found: dict[str, Any] = {"texts": len(texts), "whole": {}, "drawn": {}, "footprint": {}, "fired": {}}
    for way, x in fires.items():
        found["whole"][way] = redundancy(x.sum(0), len(x))
        found["footprint"][way], found["fired"][way] = int(x.any(0).sum()), float(x.sum(1).mean())
        found["drawn"][way] = {str(share): drawn(x, share, sizes.items) for share in SHARES}
    return found


def firings(
    store: FeatureStore, layer: int, reduction: Literal["last", "any"], texts: list[str]
) -> dict[str, np.ndarray]:
    """By way what fires on which items."""
    data = Dataset.from_store(store, layer, reduction)
    return {"features": matrix(data), "words": words(texts), "dealt": matrix(dealt(data, 0))}


def middle(at: At[Sizes]) -> int:
    layers = sorted(at.levels["layer"])
    return layers[len(layers) // 2]


def probed(at: At[Sizes]) -> list[dict[str, Any]]:
    """R-hat of a set of every family of sae-probes, over the last token and over any, by way and share of copies."""
    found, seen, data = [], set(), data_of(at.options["probes"])
    for name in data.names:
        texts = list(dict.fromkeys(text.strip() for text in data.read(name).texts if text.strip()))
        if family(name) in seen or len(texts) < at.sizes.few:
            continue
        seen.add(family(name))
        texts = [texts[i] for i in np.sort(np.random.default_rng(0).permutation(len(texts))[: at.sizes.few])]
        found.append(at.kept(f"set-{name}", lambda name=name, texts=texts: one_set(at, name, texts)))
    return found


def one_set(at: At[Sizes], name: str, texts: list[str]) -> dict[str, Any]:
    layer, options = middle(at), ExtractOptions(max_tokens=FEW_TOKENS)
    out: dict[str, Any] = {"set": name}
    with FeatureStore(stored(at, name, texts, options, [layer])) as store:
        for reduction in REDUCTIONS:
            fires = firings(store, layer, reduction, texts)
            out[reduction] = {
                way: {str(share): drawn(x, share, at.sizes.few_items) for share in (0.0, COPIED)}
                for way, x in fires.items()
            }
    return out


def drawn(x: np.ndarray, share: float, items: int) -> list[float]:
    """R-hat of `DRAWS` subsets; a draw begins with the same items at every share and for every way."""
    out = []
    for draw in range(DRAWS):
        rng = np.random.default_rng(draw)
        chosen = with_copies(rng.permutation(len(x))[:items], share, rng)
        out.append(redundancy(x[chosen].sum(0), len(chosen)))
    return out


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """The section of docs/results.md."""
    cells, compared, rising = [], [], []
    for row in rows:
        for way in WAYS:
            drawn = row["drawn"][way]
            found = [f"{bootstrap(np.array(drawn[str(share)])):.3f}" for share in SHARES]
            cells.append([row["reduction"], row["set"], row["layer"], way, row["footprint"][way], *found])
        steps = np.diff([row["drawn"]["features"][str(share)] for share in SHARES], axis=0)
        rising.append(float((steps > 0).all(0).mean()))
    for over, layer in dict.fromkeys((row["reduction"], row["layer"]) for row in rows):
        both = {row["set"]: row["drawn"] for row in rows if (row["reduction"], row["layer"]) == (over, layer)}
        if len(both) == len(SETS):
            gaps = [np.subtract(*(both[name][way]["0.0"] for name in SETS)) for way in WAYS]
            compared.append([over, layer, *(f"{bootstrap(gap):.3f}" for gap in gaps)])
    far = max(
        abs(float(np.mean(row["drawn"]["features"][share]) / np.mean(row["drawn"]["dealt"][share]) - 1))
        for row in rows
        for share in map(str, SHARES)
    )
    verdict = f"""R-hat grows with the share of planted copies, at every step in at least {min(rising):.0%} of the draws
        of every row, but it does so on dealt firings as well, from which features differ by at most {far:.1%}: the
        formula sees how often each feature fires, not which items repeat each other. Whether it follows R cannot be
        told here."""
    how = f"""`python -m experiments.real.redundancy --model FOLDER --sae FOLDER --data FOLDER --write`:
        {at.options["model"].name} with {at.options["sae"].name}; {", ".join(texts_in(rows))}. Every figure is R-hat of
        {at.sizes.items} items, of which a share are copies of the others: the mean over {DRAWS} random subsets with the
        95% interval of that mean. Words: the formula with words for features. Dealt: every feature's firings dealt to
        items at random, the control."""
    columns = ["tokens", "benchmark", "layer", "of", "footprint", *(f"{share:.0%}" for share in SHARES)]
    parts = [paragraph(verdict), paragraph(how), table(columns, cells)]
    if compared:
        parts += [
            "GSM8K less HateCheck, at as many items and without copies:",
            table(("tokens", "layer", *WAYS), compared),
        ]
    if at.options["probes"] is not None:
        parts += of_probes(at, probed(at))
    return "\n\n".join(parts)


def of_probes(at: At[Sizes], sets: list[dict[str, Any]]) -> list[str]:
    """The sets of sae-probes: whether R-hat tells them apart as words do, and whether it grows with copies."""
    columns = [(over, way) for way in ("features", "dealt") for over in REDUCTIONS] + [(REDUCTIONS[0], "words")]
    heads = [way if way == "words" else f"{way}, {READ[over]}" for over, way in columns]
    cells = []
    for one in sets:
        pairs = [[np.mean(one[over][way][str(share)]) for share in (0.0, COPIED)] for over, way in columns]
        cells.append([one["set"], *(f"{plain:.3f} to {copied:.3f}" for plain, copied in pairs)])
    means = {over: np.array([np.mean(one[over]["features"]["0.0"]) for one in sets]) for over in REDUCTIONS}
    by_words = np.array([np.mean(one[REDUCTIONS[0]]["words"]["0.0"]) for one in sets])
    said = [f"{correlation(means[over], by_words):.2f} of {READ[over]}" for over in REDUCTIONS]
    grows = [
        float(np.mean(np.array(one[over]["features"][str(COPIED)]) > np.array(one[over]["features"]["0.0"])))
        for one in sets
        for over in REDUCTIONS
    ]
    text = f"""{len(sets)} sets of sae-probes (`--probes`), {at.sizes.few} texts of at most {FEW_TOKENS} tokens each,
        layer {middle(at)}: R-hat of {at.sizes.few_items} items without copies and with {COPIED:.0%} of them, means over
        {DRAWS} subsets. With copies that of features is larger in at least {min(grows):.0%} of the subsets of every
        set. Its rank correlation with that of words, over sets without copies: with features {" and ".join(said)}."""
    return [paragraph(text), table(["set", *heads], cells)]


def texts_in(rows: list[Row]) -> list[str]:
    return [f"{n:,} texts of {name}" for name, n in {row["set"]: row["texts"] for row in rows}.items()]


experiment = Experiment(
    title=TITLE,
    varies={"reduction": REDUCTIONS, "set": SETS, "layer": (6, 18, 24)},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"reduction": ("last",), "layer": (6,)},
    quick_sizes=Sizes(items=20, texts=40, few_items=10, few=20),
    options={
        "model": {"type": Path, "required": True, "help": "the folder of the model"},
        "sae": {"type": Path, "required": True, "help": "the folder of its SAEs"},
        "data": {"type": Path, "required": True, "help": "the folder with gsm8k_test.jsonl.gz and hatecheck.jsonl.gz"},
        "probes": {"type": Path, "help": "the wheel of sae-probes, whose sets are measured, too"},
    },
)

if __name__ == "__main__":
    main(experiment)
