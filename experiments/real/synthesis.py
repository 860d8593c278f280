"""Texts for features that a corpus lacks, by a small real model: can it write for a feature at all?

    python -m experiments.real.synthesis --model FOLDER --sae FOLDER --data FOLDER --writer FOLDER [--write]

The report completes safety data by a large model that is told what a missing feature reacts to, and trains on the
result; its "15 times" compares 8,000 such examples with 120,000 others after fine-tuning. Here the step before that is
measured with a writer that fits a laptop, behind an address as `qwen-scope synthesize` asks one: a chat model that is
shown excerpts in which a feature fires, and writes a text of its own.

Documents are English texts of `corpus/en.*.jsonl` in `--data`, shuffled across sources, each the first 64 tokens.
Some are the reference, in whose store features are found and excerpts taken; others the seed corpus that lacks them.
Targets are features of one layer that fire in none of the seed corpus and in 2% to 10% of the reference's documents,
drawn at random. Every target is asked for until a text fires it or it has had its tries. Two controls, with as many
texts as there were answers: more documents of the same corpus, and texts of the same writer that is shown documents of
the seed corpus and no feature.

Whether it can write: in how many of its answers the target fires that was asked for, beside how often the other targets
fire in the same answers, which is what writing without understanding comes to. An answer that is taken from what was
shown counts as none that fires, and a synthesis does not keep it. Intervals are over targets.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from experiments.harness import At, Experiment, Row, main
from experiments.sections import paragraph, table
from qwen_scope import FeatureStore, Scope, load_scope
from qwen_scope.features import Endpoint, pool_texts
from qwen_scope.model import LoadedModel, load_model
from qwen_scope.posttrain import SynthesisOptions, Target, listed_targets, serving_writer, synthesize
from qwen_scope.scope import ExtractOptions
from qwen_scope.stats import ClusterSums, bootstrap, share
from qwen_scope.steer import Decoding, generate
from qwen_scope.text import Corpus

TOKENS, LEAST, MOST = 64, 0.02, 0.1
LENGTH, TEMPERATURE, SHOWN, TOGETHER, WAIT = 48, 0.7, 3, 8, 0.3
TITLE = "Writing data for missing features, by a small real model"


@dataclass(frozen=True)
class Sizes:
    """Documents of the reference, of the seed corpus and of more; targets, and answers asked for each at most."""

    reference: int = 400
    seed_documents: int = 50
    targets: int = 16
    tries: int = 3


@dataclass
class ModelWriter:
    """A chat model that answers what waits, some questions at a time."""

    loaded: LoadedModel
    seed: int
    waiting: list[tuple[Sequence[Mapping[str, str]], Future[str]]] = field(default_factory=list)
    turn: threading.Lock = field(default_factory=threading.Lock)
    made: int = 0

    def answer(self, messages: Sequence[Mapping[str, str]]) -> str:
        future: Future[str] = Future()
        self.waiting.append((messages, future))
        with self.turn:
            if not future.done():
                time.sleep(WAIT)  # for others to come
                some, self.waiting[:TOGETHER] = self.waiting[:TOGETHER], []
                how = Decoding(LENGTH, True, TEMPERATURE, seed=self.seed + self.made)
                asked = [[dict(one) for one in asked] for asked, _ in some]
                found = generate(self.loaded.model, self.loaded.tokenizer, asked, decoding=how, chat="default")
                for (_, each), one in zip(some, found, strict=True):
                    each.set_result(one.text)
                self.made += 1
        return future.result()


@cache
def opened(model: Path, sae: Path) -> Scope:
    return load_scope(str(model), str(sae), device="cpu", dtype="bfloat16")


@cache
def writer_of(folder: Path) -> LoadedModel:
    return load_model(str(folder), device="cpu", dtype="bfloat16")


def documents(at: At[Sizes]) -> list[str]:
    """Beginnings of English documents in an order drawn at random, the same for every seed."""
    scope, texts = opened(at.options["model"], at.options["sae"]), []
    for path in sorted((at.options["data"] / "corpus").glob("en.*.jsonl")):
        texts += [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").split("\n") if line]
    texts = list(dict.fromkeys(text.strip() for text in texts if len(text.strip()) > 4 * TOKENS))
    n = at.sizes.reference + 3 * (at.sizes.seed_documents + at.sizes.targets * at.sizes.tries)
    some = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))[:n]]
    ids = [scope.tokenizer(text, add_special_tokens=False)["input_ids"][:TOKENS] for text in some]
    return [str(scope.tokenizer.decode(one)) for one in ids]


def reference(at: At[Sizes]) -> Path:
    """The store of the reference."""
    folder = at.folder / "reference"
    if not (folder / "manifest.json").is_file():
        scope, layer = opened(at.options["model"], at.options["sae"]), at.options["layer"]
        rows = [{"text": text} for text in documents(at)[: at.sizes.reference]]
        scope.extract(rows, folder, ExtractOptions(), layers=[layer]).close()
    return folder


def missing(at: At[Sizes], store: FeatureStore, seeds: Sequence[str], seed: int) -> list[Target]:
    """Features of the reference that fire in none of the seed corpus."""
    scope, layer = opened(at.options["model"], at.options["sae"]), at.options["layer"]
    found = store.firing("max", [layer])
    counts = np.bincount(found["feature"].to_numpy(), minlength=store.layer(layer).d_sae) / store.manifest.documents
    fires = np.asarray(pool_texts(scope, seeds, [layer])[layer].maximum.astype(bool).sum(0)).ravel()
    open_ = np.flatnonzero((counts >= LEAST) & (counts <= MOST) & (fires == 0))
    chosen = np.random.default_rng([1, seed]).choice(open_, min(at.sizes.targets, len(open_)), replace=False)
    return listed_targets(store, [(layer, int(f)) for f in np.sort(chosen)], 0.0, seed)


def run(at: At[Sizes], seed: int) -> Mapping[str, Any]:
    """One synthesis with its controls."""
    scope, sizes, layer = opened(at.options["model"], at.options["sae"]), at.sizes, at.options["layer"]
    rest, n = documents(at)[sizes.reference :], sizes.seed_documents
    mine = rest[seed % 3 :: 3]
    out = at.folder / f"run{seed}"
    writer = ModelWriter(writer_of(at.options["writer"]), 1000 * seed)
    with FeatureStore(reference(at)) as store:
        targets = missing(at, store, mine[:n], seed)
    with serving_writer(writer) as server:
        found = synthesize(
            scope,
            Corpus([{"text": text} for text in mine[:n]], name="seed"),
            targets,
            Endpoint(server.url, at.options["writer"].name, concurrency=TOGETHER, timeout=600, patience=1200),
            out,
            SynthesisOptions(
                budget=len(targets) * sizes.tries,
                tries=sizes.tries,
                batch=len(targets),
                shown=SHOWN,
                max_answer_tokens=LENGTH,
                temperature=TEMPERATURE,
                seed=seed,
            ),
            natural=Corpus([{"text": text} for text in mine[n:]], name="more"),
        )
    places = [target.place for target in targets]
    asked = [line for path in sorted((out / "rounds").glob("*.jsonl")) for line in read(path)]
    said = [one for one in asked if one["text"]]
    texts = [one["text"] for one in said]
    which = [places.index((one["layer"], one["feature"])) for one in said]
    most = pool_texts(scope, texts, [layer])[layer].values("max", [target.feature for target in targets])
    new = np.array([one["outcome"] != "copied" for one in said])
    fires = np.asarray(most > 0) & new[:, None]
    return {
        "targets": [[target.feature, target.label] for target in targets],
        "answers": len(asked),
        "curves": json.loads((out / "curves.json").read_text()),
        "outcomes": found["outcomes"],
        "own": [fires[[i for i, t in enumerate(which) if t == j], j].tolist() for j in range(len(targets))],
        "others": [fires[[i for i, t in enumerate(which) if t != j], j].mean() for j in range(len(targets))],
        "examples": [[targets[which[i]].label, said[i]["outcome"], texts[i]] for i in range(min(6, len(texts)))],
    }


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tell(at: At[Sizes], rows: Sequence[Row]) -> str:
    """The section of docs/results.md."""
    counts = []  # by target: how often it fired where it was asked for, of how many; and where another was
    for row in rows:
        texts = sum(map(len, row["own"]))
        for fired, rate in zip(row["own"], row["others"], strict=True):
            counts.append((sum(fired), len(fired), rate * (texts - len(fired)), texts - len(fired)))
    sums = ClusterSums(dict(zip(("own", "asked", "by", "rest"), np.array(counts, float).T, strict=True)))
    hits, chance = sums.interval(lambda s: s["own"] / s["asked"]), sums.interval(lambda s: s["by"] / s["rest"])
    gap = sums.interval(lambda s: s["own"] / s["asked"] - s["by"] / s["rest"])
    can = gap.low > 0
    ends = {}
    for name in rows[0]["curves"]:
        ends[name] = np.mean([row["curves"][name][-1][1] / len(row["targets"]) for row in rows])
    answers = sum(row["answers"] for row in rows)
    taken = share(sum(row["outcomes"].get("copied", 0) for row in rows), answers)
    verdict = f"""A model of this size {"writes" if can else "is not shown to write"} for a feature: the target fires in
        {hits:.1%} of the texts that were asked for it, and each other target in {chance:.1%} of the same texts, a
        difference of {gap:+.1%}. {taken:.0%} of its answers are taken from what it was shown. In the end its texts
        cover {ends["targeted"]:.0%} of the targets, as many more documents of the corpus {ends["natural"]:.0%}, and as
        many of its texts without a target {ends["untargeted"]:.0%}{
        "" if ends["targeted"] > ends["natural"] else ": with this writer, more of the same data is the better way"
    }. Whether texts for features are worth 15 times as
        many others in training is not shown: that takes a fine-tune on thousands of texts, and a benchmark that models
        of this size do not fail."""
    n = [len(row["targets"]) for row in rows]
    curves = {name: [row["curves"][name][-1] for row in rows] for name in rows[0]["curves"]}
    body = []
    for name, last in curves.items():
        parts = [covered / k for (_, covered), k in zip(last, n, strict=True)]
        texts = ", ".join(str(texts) for texts, _ in last)
        covered = f"{bootstrap(parts):.1%}" if len(parts) > 1 else f"{parts[0]:.1%}"
        body.append((name, texts, ", ".join(f"{one:.0%}" for one in parts), covered))
    how = f"""`python -m experiments.real.synthesis --model FOLDER --sae FOLDER --data FOLDER --writer FOLDER --write`:
        {at.options["model"].name} with {at.options["sae"].name}, layer {at.options["layer"]}; the writer is
        {at.options["writer"].name} (bfloat16, T = {TEMPERATURE:g}, {LENGTH} tokens, {SHOWN} excerpts).
        {at.sizes.reference} documents of reference, {at.sizes.seed_documents} of seed corpus, {n[0]} targets and at
        most {at.sizes.tries} answers each; seeds {", ".join(str(row["seed"]) for row in rows)}, with documents and
        targets of their own; 95% intervals."""
    shown = [
        f"- {outcome}, “{label}”: {json.dumps(text[:160], ensure_ascii=False)}"
        for label, outcome, text in rows[0]["examples"]
    ]
    after = f"""With an endpoint: `qwen-scope synthesize SEED --store STORE --concept WORDS --writer MODEL --out FOLDER`
        asks a large model for the missing features of a concept (`--dry-run` says what it costs), and
        `qwen-scope posttrain sft FOLDER/data.jsonl --group-column label --out RUN` trains on what it kept. Outcomes
        here: {"; ".join(", ".join(f"{k} {v}" for k, v in row["outcomes"].items()) for row in rows)}."""
    columns = ("texts added", "number, by seed", "targets covered, by seed", "mean")
    return "\n\n".join(
        [
            paragraph(verdict),
            paragraph(how),
            *(paragraph(part) for part in str(__doc__).split("\n\n")[2:]),
            table(columns, body),
            paragraph("The first answers of the first seed, by the label of the target:"),
            "\n".join(shown),
            paragraph(after),
        ]
    )


experiment = Experiment(
    title=TITLE,
    varies={"seed": (0, 1, 2)},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"seed": (3,)},
    quick_sizes=Sizes(reference=80, seed_documents=8, targets=4, tries=2),
    options={
        "model": {"type": Path, "required": True, "help": "the folder of the model"},
        "sae": {"type": Path, "required": True, "help": "the folder of its SAEs"},
        "data": {"type": Path, "required": True, "help": "the folder with corpus/"},
        "writer": {"type": Path, "required": True, "help": "the folder of a chat model that writes"},
        "layer": {"type": int, "default": 18, "help": "of the targets"},
    },
)

if __name__ == "__main__":
    main(experiment)
