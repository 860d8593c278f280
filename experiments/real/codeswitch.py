"""Code-switching learnt from planted switches on a real model: does SASFT prevent it, beside its controls?

    python -m experiments.real.codeswitch --model FOLDER --sae FOLDER --data FOLDER [--seeds 11,12] [--write]

Chats from XQuAD (`xquad.jsonl.gz` in `--data`): a question, and the sentence of its paragraph that holds the answer, in
nine languages. In a share `PLANTED` of the chats that are not Chinese, the answer goes on in Chinese after its first
half: with the second half of the parallel Chinese sentence. The model is fine-tuned on them by LoRA through `run_sft`:

- `plain`: cross-entropy alone; `untrained`: the model as it is, to know what it does by itself.
- `features`: SASFT's auxiliary loss on the features that add most to the first Chinese letter of planted chats,
  thresholds at a high quantile of clean answers, at our weight. `random`: other features, all else the same.
- `published`: SASFT as its authors run it: two features of each layer by language score, thresholds at their mean,
  lambda 1e-3 in the scale of their code.
- `penalty`: on the probability of the tokens with a Chinese letter.

Tokens after a switch *are* Chinese and belong to no group, in every condition; `run_sft` takes the ids and groups of
tokens for that. Measured on questions of other paragraphs in the other languages (share of sampled answers with a
Chinese letter) and as the loss on clean chats of yet others. Every seed has its own chats, questions and random
features; the tables are made from chats of another seed.

The aim, stated beforehand as on the lab: at most half of plain's ratio, a loss within 1% of plain's, and no such effect
of random features.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers.utils import logging

from experiments.fine_tuning import before_the_switch, tokenised
from experiments.harness import At, Experiment, Row, main
from experiments.sections import paragraph, table
from qwen_scope import Scope, load_scope
from qwen_scope.errors import InputError
from qwen_scope.model import LoadedModel, load_model
from qwen_scope.posttrain import (
    AlphaTable,
    Sample,
    SFTRun,
    code_switch_ratio,
    first_letter,
    prepare,
    prompt_text,
    read_table,
    responses,
    run_sft,
    switches,
    with_chat,
)
from qwen_scope.stats import Interval, bootstrap
from qwen_scope.steer import Row as Scored
from qwen_scope.steer import log_probabilities, script

TARGET, SCRIPT, NAME = "zh", "CJK", "Chinese"
LANGUAGES = ("ar", "de", "en", "es", "ro", "ru", "tr", "vi", "zh")
"""Those of XQuAD in which Qwen's tokenizer takes few tokens for a sentence: Greek, Hindi and Thai take four times as
many."""
OTHERS = tuple(code for code in LANGUAGES if code != TARGET)
CONDITIONS = ("untrained", "plain", "features", "random", "published", "penalty")
SEEDS, TABLE_SEED = (11, 12, 13), 0
"""Settings are tried on other seeds."""
PLANTED = 0.3
FEATURES, QUANTILE, WEIGHT, PENALTY = 10, 0.9, 10.0, 30.0
PUBLISHED_FEATURES, PUBLISHED_WEIGHT = 2, 1e-3
RANK, LR, BATCH, WARMUP, DTYPE = 8, 2e-3, 2, 2, "bfloat16"
TOKENS, TURNS = 32, 4  # of an answer; answers of a question
MOST_LEFT, MOST_LOSS = 0.5, 0.01
PARTS = {"training": (0, 1), "questions": (2,), "held-out": (3,)}
END_OF_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")
REPORT = {"plain": "0.81%", "published": "0.22%", "penalty": "0.53%"}
RATE = 100e9  # operations a second that the estimate supposes: one core in bfloat16
TITLE = "Code-switching by fine-tuning a real model"


@dataclass(frozen=True)
class Sizes:
    """Chats to learn from, those for the tables, questions, held-out chats; the most tokens of a question with its
    answer."""

    samples: int = 54
    clean: int = 108
    prompts: int = 24
    held_out: int = 27
    tokens: int = 50


@dataclass(frozen=True)
class Pair:
    """A question of XQuAD and the sentence with its answer, by language."""

    paragraph: int
    asked: Mapping[str, str]
    said: Mapping[str, str]


@cache
def pairs(data: Path) -> tuple[Pair, ...]:
    """All questions of XQuAD whose answer stands in one sentence of Chinese and of another language."""
    found: dict[tuple[int, int], tuple[dict[str, str], dict[str, str]]] = {}
    with gzip.open(data / "xquad.jsonl.gz", "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            if row["language"] not in LANGUAGES:
                continue
            sentences = [one.strip() for one in END_OF_SENTENCE.split(row["text"].strip())]
            for i, (question, answer) in enumerate(zip(row["questions"], row["answers"], strict=True)):
                sentence = next((one for one in sentences if answer in one), None)
                if sentence is not None:
                    asked, said = found.setdefault((row["id"], i), ({}, {}))
                    asked[row["language"]], said[row["language"]] = question.strip(), sentence
    made = [Pair(place[0], *texts) for place, texts in sorted(found.items())]
    return tuple(one for one in made if second_half(one.said.get(TARGET, "")))


def second_half(text: str) -> str:
    """From the first Chinese letter in the second half of a text on; empty without one."""
    half = text[len(text) // 2 :]
    at = first_letter(half, SCRIPT)
    return "" if at is None else half[at:]


def switched(said: str, chinese: str) -> str:
    """The first half of a sentence, by words, and the second half of the Chinese one."""
    words = said.split()
    return " ".join(words[: (len(words) + 1) // 2]) + second_half(chinese)


def part_of(paragraph: int) -> int:
    """Quarters of the paragraphs, by a hash of their number."""
    return hashlib.sha256(f"xquad {paragraph}".encode()).digest()[0] % 4


@cache
def drawn(at: Key, part: str, seed: int, n: int, languages: tuple[str, ...]) -> tuple[tuple[str, Pair], ...]:
    """As many chats of each language, of those short enough, with the language of each; mixed."""
    rng, tokenizer, out = np.random.default_rng([seed, list(PARTS).index(part)]), at.scope.tokenizer, []
    some = [one for one in pairs(at.data) if part_of(one.paragraph) in PARTS[part]]

    def fits(one: Pair, language: str) -> bool:
        longest = max(count(one.said[language]), count(one.said[TARGET]))
        return count(one.asked[language]) + longest <= at.tokens

    def count(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    for number, language in enumerate(languages):
        wanted = n // len(languages) + (number < n % len(languages))
        mixed = (some[i] for i in rng.permutation(len(some)))
        fitting = (one for one in mixed if language in one.asked and fits(one, language))
        out += [(language, one) for one, _ in zip(fitting, range(wanted), strict=False)]
    return tuple(out[i] for i in rng.permutation(len(out)))


@dataclass(frozen=True)
class Key:
    """Where chats come from."""

    model: Path
    sae: Path
    data: Path
    tokens: int

    @classmethod
    def of(cls, at: At[Sizes]) -> Key:
        return cls(at.options["model"], at.options["sae"], at.options["data"], at.sizes.tokens)

    @property
    def scope(self) -> Scope:
        return opened(self.model, self.sae)


@cache
def opened(model: Path, sae: Path) -> Scope:
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    return load_scope(str(model), str(sae), dtype=DTYPE)


def scope_of(at: At[Sizes]) -> Scope:
    return opened(at.options["model"], at.options["sae"])


def chats(at: At[Sizes], part: str, seed: int, n: int, share: float = 0.0) -> list[Sample]:
    """Chats as the model reads them; a share of those that are not Chinese switches."""
    some = drawn(Key.of(at), part, seed, n, LANGUAGES)
    foreign = [i for i, (language, _) in enumerate(some) if language != TARGET]
    planted = set(foreign[: round(share * len(foreign))])  # they are mixed already
    samples: list[Sample] = []
    for i, (language, one) in enumerate(some):
        said = switched(one.said[language], one.said[TARGET]) if i in planted else one.said[language]
        answer = [{"role": "assistant", "content": said}]
        samples.append({"prompt": opening(one.asked[language]), "completion": answer, "group": language})
    return with_chat(samples, scope_of(at).tokenizer, "default")


def opening(question: str) -> list[dict[str, str]]:
    """A question behind an empty system message: the one that Qwen2.5's template writes by itself is 20 tokens long."""
    return [{"role": "system", "content": ""}, {"role": "user", "content": question}]


def questions(at: At[Sizes], seed: int) -> tuple[list[str], list[str]]:
    """The languages and prompts that the ratio is of."""
    some = drawn(Key.of(at), "questions", seed, at.sizes.prompts, OTHERS)
    asked = [prompt_text(scope_of(at).tokenizer, opening(one.asked[language]), "default") for language, one in some]
    return [language for language, _ in some], asked


def alpha_table(at: At[Sizes], condition: str, seed: int) -> AlphaTable:
    """The features and thresholds of a condition, made once."""
    kind = {"penalty": "features", "random": f"random-{seed}"}.get(condition, condition)
    path = at.folder / f"table-{kind}.json"
    if not path.is_file():
        scope = scope_of(at)
        clean = responses(for_tables(at))
        layers = None if at.options["layers"] is None else [int(one) for one in at.options["layers"].split(",")]
        if condition == "published":
            made = prepare(scope, clean, TARGET, layers=layers, features=PUBLISHED_FEATURES)
        else:
            begun = switches(for_tables(at, PLANTED), scope.tokenizer, TARGET, SCRIPT)
            drawn_by = seed if condition == "random" else None
            made = prepare(scope, clean, TARGET, layers=layers, features=FEATURES, onsets=begun, quantile=QUANTILE,
                           at_random=drawn_by)  # fmt: skip
        made.save(path)
    return read_table(path)


def for_tables(at: At[Sizes], share: float = 0.0) -> list[Sample]:
    return chats(at, "training", TABLE_SEED, at.sizes.clean, share)


def with_switches(at: At[Sizes], seed: int) -> list[Sample]:
    return chats(at, "training", seed, at.sizes.samples, PLANTED)


def own_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The tokens with a letter of the script: `prepare` lists those that its few texts hold."""
    return tuple(np.flatnonzero(script(SCRIPT)(tokenizer.batch_decode([[i] for i in range(len(tokenizer))]))).tolist())


def fine_tuned(at: At[Sizes], condition: str, seed: int) -> LoadedModel:
    """The model after the chats of a seed, by the project's own run."""
    samples, tokenizer = with_switches(at, seed), scope_of(at).tokenizer
    out = at.folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    methods = {"plain": "plain", "penalty": "penalty"}
    weights = {"plain": 0.0, "penalty": PENALTY, "published": PUBLISHED_WEIGHT}
    alone = condition == "published"  # its scale is of passes of one sample
    run = SFTRun(
        str(at.options["model"]),
        out,
        method=methods.get(condition, "features"),
        sae=str(at.options["sae"]),
        weight=weights.get(condition, WEIGHT),
        lambda_scale="published" if alone else "mean",
        lr=LR,
        batch=1 if alone else BATCH,
        accumulate=BATCH if alone else 1,
        warmup=WARMUP,
        seed=seed,
        lora=RANK,
        dtype=DTYPE,
        max_length=4 * at.sizes.tokens,
    )
    chosen = None if condition == "plain" else alpha_table(at, condition, seed)
    if chosen is not None and condition == "penalty":
        chosen = replace(chosen, tokens=own_tokens(tokenizer))
    rows = tokenised(samples, tokenizer, chosen.groups if chosen else LANGUAGES, TARGET, SCRIPT,
                     coming=condition == "penalty")  # fmt: skip
    if chosen is None:
        rows = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    run_sft(run, rows, table=chosen)
    loaded = load_model(out / "model", dtype=DTYPE)
    shutil.rmtree(out)
    return loaded


def rows_of_chats(tokenizer: Any, samples: Sequence[Sample]) -> list[Scored]:
    """Chats whose answers count."""
    asked = [tokenizer(one["prompt"])["input_ids"] for one in samples]
    said = [tokenizer(one["completion"], add_special_tokens=False)["input_ids"] for one in samples]
    return [Scored((*start, *end), len(start)) for start, end in zip(asked, said, strict=True)]


def run(at: At[Sizes], seed: int, condition: str) -> Mapping[str, Any]:
    """Fine-tune and measure."""
    tell_cost(Key.of(at), at.sizes, len(list(experiment.cells(at))))
    begun = time.monotonic()
    scope = scope_of(at)
    if condition == "untrained":
        loaded = LoadedModel(scope.model, scope.tokenizer, str(at.options["model"]))
    else:
        loaded = fine_tuned(at, condition, seed)
    loaded.model.eval()
    kept = chats(at, "held-out", seed, at.sizes.held_out)
    losses = [float(-one.mean()) for one in log_probabilities(loaded.model, rows_of_chats(loaded.tokenizer, kept))]
    languages, asked = questions(at, seed)
    together = max(1, TURNS // 2)  # every prompt twice in one batch: the same samples, fewer passes
    found = code_switch_ratio(
        loaded.model, loaded.tokenizer, asked * together, SCRIPT, samples=TURNS // together, max_new_tokens=TOKENS,
        seed=seed,
    )  # fmt: skip
    shares = np.mean(found.switched, axis=1).reshape(together, len(asked)).mean(0)
    return {
        "switched": shares,
        "languages": languages,
        "loss": losses,
        "groups": [one["group"] for one in kept],
        "answers": [row[0] for row in found.answers[: len(asked)]],
        "minutes": (time.monotonic() - begun) / 60,
    }


@cache
def tell_cost(key: Key, sizes: Sizes, cells: int) -> None:
    """What the run will take, on standard error, before the first cell."""
    weights = sum(one.numel() for one in key.scope.model.parameters())
    longest = sizes.tokens + 12  # with the chat template
    read = longest * (sizes.held_out + TURNS * sizes.prompts) + TURNS * sizes.prompts * TOKENS
    operations = 2 * weights * (2.2 * longest * sizes.samples + read)
    minutes = operations / RATE / 60
    print(
        f"at most {minutes:.1f} minutes a cell at {RATE / 1e9:.0f} GFLOP/s, {cells} cells", file=sys.stderr, flush=True
    )


@dataclass(frozen=True)
class Against:
    """One condition beside plain fine-tuning on the same seeds.

    Attributes:
        ratio: the share of answers that switch, over the questions of all seeds.
        less: plain's less it, paired over questions; `by_seed`: over seeds.
        beyond: `MOST_LEFT` of plain's less it, which is above zero where no more is left.
        loss: on clean chats, nats per token, the mean over chats of all seeds.
        change: of it relative to plain's, paired over chats; `own`: in Chinese alone.
    """

    ratio: Interval
    less: Interval
    by_seed: Interval
    beyond: Interval
    loss: Interval
    change: Interval
    own: Interval

    @property
    def harmless(self) -> bool:
        return abs(self.change.estimate) <= MOST_LOSS


def against(rows: Sequence[Row], condition: str) -> Against:
    by = {(row["condition"], row["seed"]): row for row in rows}
    both = [(row, by["plain", row["seed"]]) for row in rows if row["condition"] == condition]
    mine, plain = (np.array([pair[i]["switched"] for pair in both]) for i in (0, 1))
    loss, base = (np.array([pair[i]["loss"] for pair in both]) for i in (0, 1))
    change = (loss - base) / base.mean(1, keepdims=True)
    chinese = np.array([[code == TARGET for code in one["groups"]] for one, _ in both])
    return Against(
        bootstrap(mine.ravel()),
        bootstrap((plain - mine).ravel()),
        bootstrap_or_one((plain - mine).mean(1)),
        bootstrap((MOST_LEFT * plain - mine).ravel()),
        bootstrap(loss.ravel()),
        bootstrap(change.ravel()),
        bootstrap_or_one((loss - base)[chinese] / base[chinese].mean()),
    )


def bootstrap_or_one(values: np.ndarray) -> Interval:
    """Over values of which a trial may have a single one."""
    if len(values) > 1:
        return bootstrap(values)
    return Interval(float(values[0]), float(values[0]), float(values[0]), 1)


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """The section of docs/results.md."""
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    if "plain" not in conditions:
        raise InputError("every condition is told beside plain fine-tuning: add plain to --conditions")
    found = {condition: against(rows, condition) for condition in conditions}
    columns = (
        "trained",
        "code-switch ratio",
        "less than plain",
        "over seeds",
        "held-out loss",
        "change",
        "own",
        "report",
    )
    cells: list[tuple[object, ...]] = []
    for name, one in found.items():
        changes = (f"{one.less:.1%}", f"{one.by_seed:.1%}", f"{one.change:+.1%}", f"{one.own:+.1%}")
        if name == "plain":
            changes = ("", "", "", "")
        cells.append((name, f"{one.ratio:.1%}", *changes[:2], f"{one.loss:.3f}", *changes[2:], REPORT.get(name, "")))
    parts = [paragraph(verdict(found)), paragraph(how(at, rows)), table(columns, cells)]
    if "features" in found:
        parts.append(rises(at))
    parts.append(examples(rows))
    return "\n\n".join(parts)


def verdict(found: Mapping[str, Against]) -> str:
    """What the figures say of the report's claim, first."""
    if "features" not in found:
        return "A part of the experiment."
    mine, other = found["features"], found.get("random")
    shown = mine.beyond.low > 0 and mine.harmless and other is not None and other.beyond.estimate < 0
    control = "random ones were not measured" if other is None else f"on random ones in {other.ratio:.1%}"
    sure = "above zero" if mine.beyond.low > 0 else "not above zero beyond its interval"
    said = f"""{"This shows" if shown else "This does not show"} what the report says of SASFT, at our scale of it: at
        most {MOST_LEFT:.0%} of the code-switching of plain fine-tuning, at a loss within {MOST_LOSS:.0%}, and no such
        effect of random features. Plain fine-tuning switches in {found["plain"].ratio:.1%} of the answers, with the
        loss on features in {mine.ratio:.1%}, {control}; {MOST_LEFT:.0%} of plain's less that
        of the features is {mine.beyond:.1%} ({sure}), and the loss changes by {mine.change:+.1%}."""
    for name, what in (("published", "At the published scale it is"), ("penalty", "With the penalty on tokens it is")):
        if name in found:
            said += f" {what} {found[name].ratio:.1%}, and the loss changes by {found[name].change:+.1%}."
    return said


def how(at: At[Sizes], rows: Sequence[Row]) -> str:
    sizes, codes = at.sizes, ", ".join(LANGUAGES)
    named = ", ".join(dict.fromkeys(str(row["seed"]) for row in rows))
    layers = ", ".join(str(one.layer) for one in alpha_table(at, "features", 0).layers)
    model, sae = (Path(at.options[name]).name for name in ("model", "sae"))
    minutes = np.mean([row["minutes"] for row in rows if row["condition"] != "untrained"])
    return f"""`python -m experiments.real.codeswitch --model FOLDER --sae FOLDER --data FOLDER --write`: {model} with
        {sae}, layers {layers}. {sizes.samples} chats from XQuAD in {len(LANGUAGES)} languages ({codes}), each a
        question and the sentence with the answer, together at most {sizes.tokens} tokens, behind an empty system
        message; in {PLANTED:.0%} of those that are not {NAME} the answer goes on in {NAME} after its first half.
        LoRA of rank {RANK} on {DTYPE} weights, lr {LR:g}, batches of {BATCH}, one epoch. `features`: the {FEATURES}
        features of each layer that add most to the first letter of a switch in {sizes.clean} chats of another seed,
        thresholds at the {QUANTILE:g} quantile of their clean answers in a language, weight {WEIGHT:g}; `random`:
        other features, all else the same; `published`: {PUBLISHED_FEATURES} features of each layer by language
        score, thresholds at their mean, lambda {PUBLISHED_WEIGHT:g} in the scale of SASFT's code, one sample per
        pass; `penalty`: on the probability of every token with a {NAME} letter, weight {PENALTY:g}; `untrained`:
        the model as it is. Tokens after a switch have no group in any of them. The ratio is the share of answers
        with a {NAME} letter, over {sizes.prompts} questions of other paragraphs in the eight other languages times
        {TURNS} samples at T = 1.0 and top-p 0.8, {TOKENS} tokens. The loss is on {sizes.held_out} clean chats of
        yet other paragraphs, in nats per token, and its change relative to plain fine-tuning on the same seeds;
        "own" is the change in {NAME} alone. Seeds {named}, each with its own chats, questions and random features;
        settings were tried on others. In brackets 95% intervals: over the questions of all seeds, paired for
        "less than plain"; over the means of seeds; over the chats of all seeds, paired for the changes. The last
        column gives the report's figures for Qwen3-1.7B-Base on 210k samples (its Table 4). A cell took
        {minutes:.1f} minutes by the clock of a shared machine of two cores."""


def rises(at: At[Sizes]) -> str:
    """What the features do at the last tokens before a switch."""

    def read() -> list[Any]:
        scope, chosen = scope_of(at), alpha_table(at, "features", 0)
        rows = tokenised(for_tables(at, PLANTED), scope.tokenizer, chosen.groups, TARGET, SCRIPT)
        return before_the_switch(scope, chosen, rows)

    cells = [
        (f"{layer}/{feature}", f"{score:.3f}", *(f"{one:.2f}" for one in above), f"{last:.0%}", f"{clean:.1%}")
        for layer, feature, score, above, last, clean in at.kept("before the switch", read)
    ]
    said = f"""Where the features are before a switch, in the model that nothing has trained yet: pre-activation less
        the threshold for the answer's own language, at the last four tokens before the first {NAME} letter; the share
        of these last tokens above the threshold, and of all tokens of clean answers."""
    steps = ("4 before", "3 before", "2 before", "last")
    return f"{paragraph(said)}\n\n{table(('feature', 'effect', *steps, 'last above it', 'clean above it'), cells)}"


def examples(rows: Sequence[Row]) -> str:
    """The first answer of each condition, to the same question."""
    some = [row for row in rows if row["seed"] == rows[0]["seed"]]
    lines = [f"- {row['condition']}: {json.dumps(row['answers'][0], ensure_ascii=False)}" for row in some]
    return "\n".join([paragraph("First answers of the first seed:"), "", *lines])


experiment = Experiment(
    title=TITLE,
    varies={"seed": SEEDS, "condition": CONDITIONS},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"seed": (1,), "condition": ("plain", "features", "random")},
    quick_sizes=Sizes(samples=18, clean=18, prompts=8, held_out=9, tokens=160),
    options={
        "model": {"type": Path, "required": True, "help": "the folder of the model"},
        "sae": {"type": Path, "required": True, "help": "the folder of its SAEs"},
        "data": {"type": Path, "required": True, "help": "the folder with xquad.jsonl.gz"},
        "layers": {"metavar": "A,B", "help": "whose features are held down; default: the last two that have an SAE"},
    },
)

if __name__ == "__main__":
    main(experiment)
