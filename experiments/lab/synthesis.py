"""Does writing for missing features cover them where more of the same data does not, and does it help a classifier?

    python -m experiments.lab.synthesis [--strengths 0.95] [--seeds 1,2,3,4,5] [--write]

The seed corpus is a web in small: one or two sentences each, half of them English, a few in Korean, one in twenty rude.
Targets are the features that fire on rude speech in any of the nine languages, chosen on another, balanced corpus that
also gives their contexts. Three ways to add as many texts: more of the same corpus; texts by a writer that sees texts
of the seed corpus; texts by the same writer that is told the target, kept where it fires. The writer answers over HTTP
from the lab's grammar; it sees only the prompt, and one text in ten is a mistake. Then a rude classifier is trained on
each data set, with the grammar as annotator, and tested on templates and combinations never seen in training.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from experiments.harness import At, Experiment, Row, main
from experiments.lab.bundled import lab
from experiments.sections import paragraph, table
from qwen_scope import FeatureStore, Scope
from qwen_scope.analysis import Dataset, Labelled, fit_rule, logistic, text_baseline
from qwen_scope.features import Endpoint, pool_texts
from qwen_scope.lab import LANGUAGES, Document, Mixture, default_mixture, documents
from qwen_scope.model import LoadedModel
from qwen_scope.posttrain import LabWriter, SynthesisOptions, Target, listed_targets, serving_writer, synthesize
from qwen_scope.scope import extract
from qwen_scope.stats import bootstrap
from qwen_scope.text import Corpus

LAYER, WANT = 5, 3
STRENGTHS, CLASSIFIED = (0.95, 0.0), 0.95
SHARES = {code: 1 / (i + 1) ** 1.5 for i, code in enumerate(("en", "zh", "es", "de", "fr", "ru", "ja", "ar", "ko"))}
REGISTERS = {"plain": 0.75, "polite": 0.15, "archaic": 0.05, "rude": 0.05}
DELTA = 0.1
"""By how much a target's firing share on a language's rude texts exceeds that on its others, at least."""
SIZES = (25, 50, 100)
ERRORS = 0.1
HELD_OUT = ("heldout_templates", "heldout_combinations")
CONDITIONS = ("natural", "untargeted", "targeted")
CLASSIFIERS = ("logistic", "TF-IDF", "rule of 5 features")
AIM = 0.99
TITLE = "Writing data for missing features"


@dataclass(frozen=True)
class Sizes:
    """Texts of the balanced corpus and of the seed corpus, answers asked for, test texts per language and register."""

    reference: int = 2000
    seed_texts: int = 200
    budget: int = 160
    test: int = 20


def web() -> Mixture:
    """The mixture of the seed corpus."""
    return replace(default_mixture(), languages=SHARES, registers=REGISTERS, sentences=(1, 2))


def balanced() -> Mixture:
    """Every language and register alike."""
    return replace(default_mixture(), sentences=(1, 2))


def talks(seed: int, n: int, mixture: Mixture, split: str = "train", **only: list[str]) -> list[Document]:
    return list(documents(split, seed, n, ["talk"], mixture=mixture, **only))


def corpus_of(found: Sequence[Document], name: str) -> Corpus:
    return Corpus([{"text": d.text} for d in found], name=name)


@cache
def targets_at(folder: Path, strength: float, n: int) -> list[Target]:
    """The targets of a strength, from the balanced corpus, whose store the folder keeps."""
    scope, found = lab(), talks(1, n, balanced())
    loaded = LoadedModel(scope.model, scope.tokenizer, scope.name)
    with extract(corpus_of(found, "reference"), loaded, {LAYER: scope.saes[LAYER]}, folder / "reference") as store:
        return targets_of(store, found, strength)


def targets_of(store: FeatureStore, found: Sequence[Document], strength: float) -> list[Target]:
    """Features that fire on more of the rude texts than of the others, in any language, at this strength."""
    table_ = store.firing("max", [LAYER])
    d, f, value = (table_[name].to_numpy() for name in ("document", "feature", "value"))
    width = store.layer(LAYER).d_sae
    above = np.zeros(width)
    if strength:
        for i in np.unique(f):  # a feature that never fires has no quantiles
            above[i] = store.quantiles(LAYER, int(i), [strength])[0]
    fires = np.zeros((len(found), width), bool)
    strong = value > above[f]
    fires[d[strong], f[strong]] = True
    language = np.array([one.language for one in found])
    rude = np.array([one.register == "rude" for one in found])
    chosen: set[int] = set()
    for code in LANGUAGES:
        here = language == code
        more = fires[here & rude].mean(0) - fires[here & ~rude].mean(0)
        chosen |= set(np.flatnonzero(more >= DELTA).tolist())
    return listed_targets(store, [(LAYER, i) for i in sorted(chosen)], strength)


@dataclass(frozen=True)
class Coverage:
    """What one run covered."""

    strength: float
    seed: int
    targets: int
    before: float
    answers: int
    kept: int
    outcomes: dict[str, int]
    curves: dict[str, list[tuple[int, float]]]
    data: dict[str, list[tuple[str, bool]]]


def cover(scope: Scope, targets: list[Target], strength: float, seed: int, sizes: Sizes) -> Coverage:
    """One synthesis with its controls."""
    seeds = talks(100 + seed, sizes.seed_texts, web())
    more = talks(200 + seed, sizes.budget, web())
    writer = LabWriter(ERRORS, seed)
    with tempfile.TemporaryDirectory() as folder, serving_writer(writer) as server:
        out = Path(folder) / "run"
        found = synthesize(
            scope,
            corpus_of(seeds, "seed"),
            targets,
            Endpoint(server.url, "lab-writer", concurrency=4),
            out,
            SynthesisOptions(want=WANT, budget=sizes.budget, tries=12, seed=seed, batch=16),
            natural=corpus_of(more, "more"),
        )
        kept = [json.loads(line)["text"] for line in (out / "data.jsonl").read_text(encoding="utf-8").splitlines()]
        curves = json.loads((out / "curves.json").read_text())
        free = [
            json.loads(line)
            for path in sorted((out / "untargeted").glob("*.jsonl"))
            for line in path.read_text(encoding="utf-8").splitlines()
        ]
        written = dict(writer.written)

    def rude(text: str) -> bool:
        """Whether the grammar wrote it rudely. Of an answer that is a chat, only what follows its thinking was read."""
        whole = text if text in written else next(one for one in written if one.endswith(text))
        return written[whole].register == "rude"

    data = {
        "seed": [(d.text, d.register == "rude") for d in seeds],
        "natural": [(d.text, d.register == "rude") for d in more],
        "untargeted": [(one["text"], rude(one["text"])) for one in free if one["outcome"] == "kept"],
        "targeted": [(text, rude(text)) for text in kept],
    }
    n = len(targets)
    return Coverage(
        strength,
        seed,
        n,
        found["coverage_before"],
        found["answers"],
        len(kept),
        found["outcomes"],
        {name: [(texts, covered / n) for texts, covered in curve] for name, curve in curves.items()},
        data,
    )


def test_set(seed: int, n: int) -> tuple[list[str], np.ndarray]:
    """Rude and other sentences of every language, held out from the grammar's training texts."""
    texts, labels = [], []
    for split in HELD_OUT:
        for code in LANGUAGES:
            for registers in (["rude"], ["plain", "polite", "archaic"]):
                found = talks(300 + seed, n // 2, balanced(), split, languages=[code], registers=registers)
                texts += [d.text for d in found]
                labels += [registers == ["rude"]] * len(found)
    return texts, np.array(labels)


def encoded(scope: Scope, texts: list[str]) -> tuple[np.ndarray, Dataset]:
    """Mean residuals, and the largest activations of every feature."""
    residuals = []
    for start in range(0, len(texts), 128):
        tokens = scope.tokenize(texts[start : start + 128], truncate=True)
        mask = tokens.attention_mask.bool()[..., None]
        h = scope.capture(tokens, [LAYER])[LAYER]
        residuals.append(((h * mask).sum(1) / mask.sum(1)).numpy())
    most = pool_texts(scope, texts, [LAYER])[LAYER].maximum.tocsr()
    most.sort_indices()
    item = np.repeat(np.arange(len(texts), dtype=np.int32), np.diff(most.indptr))
    columns = (item, most.indices.astype(np.int32), most.data.astype(np.float32), np.full(len(item), -1, np.int32))
    sae = scope.saes[LAYER]
    name = tuple(map(str, range(len(texts))))
    return np.concatenate(residuals), Dataset("texts", name, LAYER, sae.d_sae, sae.identity.fingerprint, *columns)


def f1(called: np.ndarray, labels: np.ndarray) -> float:
    return float(2 * (called & labels).sum() / max(1, called.sum() + labels.sum()))


def classify(scope: Scope, run: Coverage, n_test: int) -> list[dict]:
    """F1 of three classifiers trained on the seed corpus and texts of each condition, by their number."""
    texts, labels = test_set(run.seed, n_test)
    x_test, fires_test = encoded(scope, texts)
    everything = [one for part in ("seed", *CONDITIONS) for one in run.data[part]]
    places = np.cumsum([0, *(len(run.data[part]) for part in ("seed", *CONDITIONS))])
    words, y = [text for text, _ in everything], np.array([label for _, label in everything])
    x, fires = encoded(scope, words)
    sizes = [n for n in SIZES if n <= min(len(run.data[condition]) for condition in CONDITIONS)]
    rows = []
    for condition, n in [("seed", 0), *((condition, n) for n in sizes for condition in CONDITIONS)]:
        # Of every condition texts at random, not the first: the targeted ones come in an order.
        start, end = places[("seed", *CONDITIONS).index(condition)], places[("seed", *CONDITIONS).index(condition) + 1]
        added = np.random.default_rng(run.seed).permutation(np.arange(start, end))[:n]
        use = np.concatenate([np.arange(places[1]), added])
        rule = fit_rule(Labelled({LAYER: fires.take(use)}, y[use]), 5)
        scores = {
            "logistic": f1(logistic(x[use], y[use], x_test)[0], labels),
            "TF-IDF": f1(text_baseline([words[i] for i in use], y[use], texts)[0], labels),
            "rule of 5 features": f1(rule.decide({LAYER: fires_test}), labels),
        }
        rows.append({"condition": condition, "n": n, "seed": run.seed, "rude": float(y[use].mean()), **scores})
    return rows


def spread(values: Sequence[float], percent: bool = True) -> str:
    """Mean and interval over seeds."""
    found = bootstrap(list(values)) if len(values) > 1 else None
    style = "{:.1%}" if percent else "{:.3f}"
    mean = style.format(float(np.mean(values)))
    return f"{mean} ({style.format(found.low)} to {style.format(found.high)})" if found else mean


def reached(curve: Sequence[tuple[int, float]], share: float) -> int | None:
    """After how many texts a curve reaches a share."""
    return next((n for n, covered in curve if covered >= share), None)


def covered_at(curve: Sequence[tuple[int, float]], n: int) -> float:
    """What a curve has covered after `n` texts."""
    return [covered for texts, covered in curve if texts <= n][-1]


def coverage_rows(runs: list[Coverage]) -> tuple[list[tuple], list[str]]:
    """The lines of the first table, and whether the aim is met at each strength."""
    cells, verdicts = [], []
    for strength in sorted({run.strength for run in runs}):
        some = [run for run in runs if run.strength == strength]
        aims = [reached(run.curves["targeted"], AIM) for run in some]
        ends = [aim if aim is not None else run.answers for run, aim in zip(some, aims, strict=True)]
        conditions = {a: [covered_at(run.curves[a], n) for run, n in zip(some, ends, strict=True)] for a in CONDITIONS}
        last = {a: [run.curves[a][-1][1] for run in some] for a in CONDITIONS}
        met = [
            aim is not None and max(conditions["natural"][i], conditions["untargeted"][i]) < AIM
            for i, aim in enumerate(aims)
        ]
        verdicts.append(f"strength {strength:g}: {sum(met)} of {len(met)} seeds")
        budgets = ", ".join("never" if aim is None else str(aim) for aim in aims)
        at_end = " / ".join(f"{np.mean(last[condition]):.1%}" for condition in CONDITIONS)
        answers = f"{min(run.answers for run in some)} to {max(run.answers for run in some)}"
        before = spread([run.before for run in some])
        measured = (spread(conditions[condition]) for condition in CONDITIONS)
        cells.append((f"{strength:g}", some[0].targets, before, budgets, *measured, answers, at_end))
    return cells, verdicts


def classifier_rows(rows: list[dict]) -> tuple[list[tuple], list[tuple]]:
    """F1 by condition and number of texts, and the gain per 100 texts."""
    base = {name: {row["seed"]: row[name] for row in rows if row["condition"] == "seed"} for name in CLASSIFIERS}
    lines, gains = [], []
    for condition, n in dict.fromkeys((row["condition"], row["n"]) for row in rows):
        some = [row for row in rows if (row["condition"], row["n"]) == (condition, n)]
        scores = (spread([row[name] for row in some], False) for name in CLASSIFIERS)
        lines.append((condition, n, f"{np.mean([row['rude'] for row in some]):.1%}", *scores))
        if n:
            per = [[(row[name] - base[name][row["seed"]]) / n * 100 for row in some] for name in CLASSIFIERS]
            gains.append((condition, n, *(spread(values, False) for values in per)))
    return lines, gains


def run(at: At[Sizes], strength: float, seed: int) -> dict[str, Any]:
    """One synthesis with its controls, and at one strength the classifiers trained on what they made."""
    covered = cover(lab(), targets_at(at.folder, strength, at.sizes.reference), strength, seed, at.sizes)
    rows = classify(lab(), covered, at.sizes.test) if strength == CLASSIFIED else []
    return {"coverage": asdict(covered), "classified": rows}


def tell(at: At[Sizes], found: list[Row]) -> str:
    """The section of docs/results.md."""
    runs, sizes = [Coverage(**one["coverage"]) for one in found], at.sizes
    rows = [row for one in found for row in one["classified"]]
    cells, verdicts = coverage_rows(runs)
    lines, gains = classifier_rows(rows)
    seeds, total = len({run.seed for run in runs}), sum(SHARES.values())
    held_out = len(HELD_OUT) * len(LANGUAGES) * sizes.test
    setting = f"""`python -m experiments.lab.synthesis --write`, layer {LAYER} of the bundled lab, {seeds} seeds. Seed
        corpus: {sizes.seed_texts} talks of one or two sentences, languages by a power law ({SHARES["en"] / total:.0%}
        English, {SHARES["ko"] / total:.0%} Korean), {REGISTERS["rude"]:.0%} rude. Targets: features whose firing
        share on a language's rude talks exceeds that on its other talks by {DELTA:g} or more, over
        {sizes.reference:,} balanced talks, which also give the contexts in the prompts. A target fires where it
        exceeds a share of its own activations there (the strength; 0 is the report's rule: on any token at all).
        Three ways to add equally many texts: more of the same corpus (natural); the writer imitating texts of the
        seed corpus (untargeted); the writer told label and contexts of a target, its text kept where the target fires
        (targeted). The writer answers over HTTP from the lab's grammar, sees only the prompt, and {ERRORS:.0%} of its
        texts are drawn at random from the whole grammar. All targeted answers count, kept or not. Up to
        {sizes.budget} answers were requested, until each target fires in {WANT} texts. Intervals are over seeds."""
    classified = f"""A rude classifier trained on the seed corpus and texts of each condition (strength
        {CLASSIFIED:g}, drawn at random from what the condition made; targeted texts are the kept ones), with the
        grammar as annotator. F1 on {held_out} talks of all nine languages, half of them rude, with templates and
        combinations that no condition may use:"""
    columns = ("strength", "targets", "seed corpus", f"answers to {AIM:.0%}", *CONDITIONS, "answers in all", "then")
    return "\n\n".join(
        (
            paragraph(setting),
            table(columns, cells),
            paragraph(
                f"The conditions are compared at the texts in 'answers to {AIM:.0%}'; 'then' is natural / untargeted"
                f" / targeted at the end. The report prints 99.74% at its matched budget. {AIM:.0%} with both others"
                f" below: {'; '.join(verdicts)}."
            ),
            paragraph(classified),
            table(("texts added", "number", "rude in training", *CLASSIFIERS), lines),
            "Gain in F1 over the seed corpus alone, per 100 texts added:",
            table(("texts added", "number", *CLASSIFIERS), gains),
            outcomes(runs),
        )
    )


def outcomes(runs: list[Coverage]) -> str:
    """What became of the targeted answers."""
    notes = []
    for strength in sorted({run.strength for run in runs}):
        some = [run for run in runs if run.strength == strength]
        names = sorted({name for run in some for name in run.outcomes})
        answers = max(1, sum(run.answers for run in some))
        shares = [f"{sum(run.outcomes.get(name, 0) for run in some) / answers:.0%} {name}" for name in names]
        left = ", ".join(str(round((1 - run.curves["targeted"][-1][1]) * run.targets)) for run in some)
        said = f"Strength {strength:g}: of the answers {', '.join(shares) or 'none'}; targets left: {left}."
        notes.append("- " + paragraph(said))
    return "\n".join(notes)


experiment = Experiment(
    title=TITLE,
    varies={"strength": STRENGTHS, "seed": (1, 2, 3, 4, 5)},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"strength": (CLASSIFIED,), "seed": (1,)},
    quick_sizes=Sizes(reference=200, seed_texts=40, budget=32, test=2),
)

if __name__ == "__main__":
    main(experiment)
