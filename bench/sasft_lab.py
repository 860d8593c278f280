"""SASFT on the lab: does the auxiliary loss cure the code-switching that plain fine-tuning on the same data teaches?

    .venv/bin/python bench/sasft_lab.py [--write] [--targets zh,ru,ko]

For every target language the lab's chats are mixed with chats whose answers drift into it, and the bundled model is
fine-tuned on them: plainly, with the auxiliary loss on the target's features, with the same loss on features drawn at
random, and with the penalty on the target's tokens. Measured on questions in other languages and scripts, and as the
loss on held-out chats without any drift.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from sections import paragraph, table, write_section
from transformers import PrinterCallback
from transformers.utils import logging
from trl.trainer.sft_config import SFTConfig

from qwen_scope import Scope, load_scope
from qwen_scope.lab import LANGUAGES, chat_prompts, default_mixture, documents
from qwen_scope.model import HookPoint, capture, load_model
from qwen_scope.posttrain import (
    AlphaTable,
    FeatureLoss,
    FeatureSFTTrainer,
    Sample,
    TokenPenalty,
    chats_only,
    code_switch_ratio,
    lab_samples,
    prepare,
    responses,
)
from qwen_scope.scope import model_source
from qwen_scope.stats import bootstrap
from qwen_scope.steer import script

SCRIPTS = {"zh": "CJK", "ko": "HANGUL", "ru": "CYRILLIC", "ar": "ARABIC"}
SHARES_SCRIPT = {"zh": {"ja"}, "ko": set(), "ru": set(), "ar": set()}
ARMS = ("plain", "features", "random", "penalty")
DRIFT, SAMPLES, HELD_OUT, PROMPTS, TURNS, NEW_TOKENS = 0.3, 256, 48, 16, 8, 32
LAYERS, FEATURES, WEIGHT, PENALTY, LR, ZERO = (4, 5), 10, 10.0, 10.0, 1e-3, True
IGNORED, NO_GROUP = -100, -1
TITLE = "SASFT on the lab"
PUBLISHED = {  # percent, Qwen3-1.7B-Base, 210k samples
    "plain": {"zh": 0.81, "ru": 0.19, "ko": 0.36},
    "features": {"zh": 0.22, "ru": 0.03, "ko": 0.00},
    "penalty": {"zh": 0.53, "ru": 0.09, "ko": 0.06},
}


@dataclass(frozen=True)
class Run:
    """One fine-tuning and what was measured after it."""

    target: str
    arm: str
    seed: int
    ratio: float
    loss: float
    seconds: float


def others(target: str) -> list[str]:
    """The languages whose answers should not hold the target's script."""
    return [code for code in LANGUAGES if code != target and code not in SHARES_SCRIPT[target]]


def training_data(target: str, seed: int) -> list[Sample]:
    """Chats in all languages; in a share of them, in the other scripts, the answer drifts into the target."""
    mixture = replace(
        default_mixture(),
        kinds={"chat": 1 - DRIFT, "drift": DRIFT},
        chat={"topic": 1.0},
        drift={code: {target: 1.0} for code in others(target)},
    )
    found = documents(seed=1000 + seed, n=None, kinds=["chat", "drift"], mixture=mixture)
    samples: list[Sample] = []
    for document in found:
        samples += chats_only(lab_samples([document]))
        if len(samples) == SAMPLES:
            break
    return samples


def held_out() -> list[Sample]:
    """Chats with sentences that were never trained on, none of them drifting."""
    mixture = replace(default_mixture(), chat={"topic": 1.0})
    found = documents(split="heldout_sentences", seed=7, n=HELD_OUT, kinds=["chat"], mixture=mixture)
    return chats_only(lab_samples(found))


def tables_of(scope: Scope, target: str, seeds: Sequence[int]) -> dict[tuple[str, int], AlphaTable]:
    """The alpha table of the features by score, and per seed one of features at random."""
    labelled = responses(lab_samples(documents(seed=500, n=270, kinds=["talk"])))
    best = prepare(scope, labelled, target, layers=LAYERS, features=FEATURES)
    out = {("features", seed): best for seed in seeds} | {("penalty", seed): best for seed in seeds}
    for seed in seeds:
        out["random", seed] = prepare(scope, labelled, target, layers=LAYERS, features=FEATURES, at_random=seed)
    return out


def tokenised(samples: Sequence[Sample], tokenizer: Any, groups: Sequence[str], target: str, arm: str) -> Dataset:
    """Samples as token ids with a group per token: the sample's up to a switch, none after it.

    What comes after the switch *is* text of the target, which the method leaves out. The penalty acts on the token to
    come, so for it the first token of the switch counts as well. Samples in a language that shares the target's script
    have no group.
    """
    inside = script(SCRIPTS[target])
    rows = []
    for sample in samples:
        asked = tokenizer(sample["prompt"], add_special_tokens=False)["input_ids"]
        text = sample["completion"]
        said = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        letters = np.flatnonzero(inside(list(text)) > 0)
        switch = letters[0] if len(letters) and sample["group"] != target else len(text)
        number = NO_GROUP if sample["group"] in SHARES_SCRIPT[target] else groups.index(sample["group"])
        own = [number if end <= switch else NO_GROUP for _, end in said["offset_mapping"]]
        if arm == "penalty" and NO_GROUP in own:
            own[own.index(NO_GROUP)] = number
        ids = said["input_ids"]
        row = {"input_ids": asked + ids, "labels": [IGNORED] * len(asked) + ids}
        rows.append({**row, "groups": [NO_GROUP] * len(asked) + own})
    return Dataset.from_list(rows)


def rises(scope: Scope, target: str, seed: int, chosen: AlphaTable) -> list[tuple[object, ...]]:
    """Per feature how far it lies above its group's mean before a switch, in the model that nothing has trained yet.

    The mean over drifting chats at the last four tokens before the target's first letter, and over all response tokens
    of clean chats the share above zero.
    """
    rows = tokenised(training_data(target, seed), scope.tokenizer, chosen.groups, target, "features")
    before: dict[int, list[np.ndarray]] = {one.layer: [] for one in chosen.layers}
    clean: dict[int, list[np.ndarray]] = {one.layer: [] for one in chosen.layers}
    for row in rows:
        groups = np.array(row["groups"])
        counted = np.flatnonzero((groups != NO_GROUP) & (groups != chosen.groups.index(target)))
        if len(counted) < 4:
            continue
        group, switches = chosen.groups[groups[counted[0]]], groups[-1] == NO_GROUP
        ids = torch.tensor([row["input_ids"]])
        residuals = capture(scope.model, ids, [HookPoint(one.layer) for one in chosen.layers])
        for one in chosen.layers:
            pre = scope.saes[one.layer].pre_acts(residuals[HookPoint(one.layer)][0], list(one.features)).numpy()
            (before if switches else clean)[one.layer].append(
                pre[counted[-4:]] - np.array(one.alpha[group]) if switches else pre[counted] > 0
            )
    out: list[tuple[object, ...]] = []
    for one in chosen.layers:
        rise, above = np.mean(before[one.layer], axis=0), np.concatenate(clean[one.layer]).mean(0)
        for j, feature in enumerate(one.features):
            values = [f"{value:.2f}" for value in rise[:, j]]
            out.append((one.layer, j + 1, feature, one.scores[j], *values, f"{above[j]:.1%}"))
    return out


def one_run(scope: Scope, target: str, arm: str, seed: int, chosen: AlphaTable, weight: float) -> Run:
    """Fine-tune and measure."""
    begun = time.monotonic()
    loaded = load_model(model_source("lab"))
    loaded.model.requires_grad_(True)
    extra = {
        "plain": lambda: None,
        "features": lambda: FeatureLoss(chosen, scope.saes, weight=weight, zero=ZERO),
        "random": lambda: FeatureLoss(chosen, scope.saes, weight=weight, zero=ZERO),
        "penalty": lambda: TokenPenalty(chosen, loaded.model, weight=PENALTY),
    }[arm]()
    data = training_data(target, seed), held_out()
    rows = [tokenised(some, loaded.tokenizer, chosen.groups, target, arm) for some in data]
    if extra is None:
        rows = [some.remove_columns("groups") for some in rows]
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            folder,
            learning_rate=LR,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=16,
            warmup_steps=2,
            weight_decay=0.1,
            lr_scheduler_type="cosine",
            max_length=256,
            num_train_epochs=1,
            seed=seed,
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = FeatureSFTTrainer(
            loaded.model,
            settings,
            train_dataset=rows[0],
            eval_dataset=rows[1],
            processing_class=loaded.tokenizer,
            extra=extra,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
    prompts = [p.text for p in chat_prompts(seed=90, n=PROMPTS, languages=others(target))]
    found = code_switch_ratio(  # every prompt several times in one batch: the same samples, fewer passes
        loaded.model,
        loaded.tokenizer,
        prompts * (TURNS // 2),
        SCRIPTS[target],
        samples=2,
        max_new_tokens=NEW_TOKENS,
        seed=seed,
    )
    return Run(target, arm, seed, found.ratio.estimate, loss, time.monotonic() - begun)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--targets", default="zh,ru,ko")
    ask.add_argument("--arms", default=",".join(ARMS))
    ask.add_argument("--seeds", default="1,2,3")
    ask.add_argument("--weight", type=float, default=WEIGHT)
    ask.add_argument("--keep", type=Path, help="a .jsonl that finished runs are added to and taken from")
    ask.add_argument("--write", action="store_true", help="write the section of docs/results.md")
    given = ask.parse_args()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    seeds, arms = [int(s) for s in given.seeds.split(",")], given.arms.split(",")
    scope = load_scope("lab")
    kept = given.keep.read_text().splitlines() if given.keep and given.keep.is_file() else []
    runs = [Run(**json.loads(line)) for line in kept]
    done = {(run.target, run.arm, run.seed) for run in runs}
    for target in given.targets.split(","):
        wanted = [(arm, seed) for seed in seeds for arm in arms if (target, arm, seed) not in done]
        tables = tables_of(scope, target, seeds) if wanted else {}
        for arm, seed in wanted:
            found = tables.get((arm, seed), tables["features", seed])
            runs.append(one_run(scope, target, arm, seed, found, given.weight))
            print(runs[-1], flush=True)
            if given.keep:
                with given.keep.open("a") as file:
                    file.write(json.dumps(asdict(runs[-1])) + "\n")
    first = given.targets.split(",")[0]
    body = written(runs, given.weight) + before_the_switch(scope, first, seeds[0])
    print(body)
    if given.write:
        write_section(TITLE, body)


def before_the_switch(scope: Scope, target: str, seed: int) -> str:
    """What the features do at the last tokens before a switch."""
    chosen = tables_of(scope, target, [seed])["features", seed]
    columns = (
        "layer",
        "rank by score",
        "feature",
        "score",
        "4 before",
        "3 before",
        "2 before",
        "last",
        "clean above 0",
    )
    said = f"""Where the features of {target} stand before a switch, in the model as bundled: pre-activation less the
        mean on the text's own language, at the last four tokens before the first letter of {target}, and the share of
        tokens of clean answers on which it is above zero."""
    return f"\n\n{paragraph(said)}\n\n{table(columns, rises(scope, target, seed, chosen))}"


def written(runs: Sequence[Run], weight: float) -> str:
    """The section of docs/results.md."""
    targets, arms = list(dict.fromkeys(r.target for r in runs)), list(dict.fromkeys(r.arm for r in runs))
    seeds = len({r.seed for r in runs})

    def of(target: str, arm: str, name: str, like: str) -> np.ndarray:
        """Of the seeds that both arms have."""
        known = {r.seed for r in runs if (r.target, r.arm) == (target, like)}
        return np.array([getattr(r, name) for r in runs if (r.target, r.arm) == (target, arm) and r.seed in known])

    rows = []
    for target in targets:
        for arm in (arm for arm in arms if any((r.target, r.arm) == (target, arm) for r in runs)):
            plain, base = of(target, "plain", "ratio", arm), of(target, "plain", "loss", arm)
            ratio, loss = of(target, arm, "ratio", "plain"), of(target, arm, "loss", "plain")
            spread = bootstrap(ratio) if len(ratio) > 1 else None
            interval = f"{spread.low:.1%} to {spread.high:.1%}" if spread else ""
            cut = "" if arm == "plain" else f"{1 - ratio.mean() / plain.mean():.0%}"
            moved = "" if arm == "plain" else f"{loss.mean() / base.mean() - 1:+.2%}"
            published = PUBLISHED[arm].get(target) if arm in PUBLISHED else None
            said = f"{published:.2f}%" if published is not None else ""
            cells = (target, arm, len(ratio), f"{ratio.mean():.1%}", interval, cut, f"{loss.mean():.4f}", moved, said)
            rows.append(cells)

    def halved(target: str, arm: str) -> bool:
        return bool(of(target, arm, "ratio", "plain").mean() <= 0.5 * of(target, "plain", "ratio", arm).mean())

    def near(target: str) -> bool:
        moved = of(target, "features", "loss", "plain").mean() / of(target, "plain", "loss", "features").mean()
        return bool(abs(moved - 1) <= 0.01)

    verdict = ""
    if {"plain", "features", "random"} <= set(arms):
        cured, control = [t for t in targets if halved(t, "features")], [t for t in targets if halved(t, "random")]
        kept = [t for t in targets if near(t)]
        verdict = f"""Halved: {", ".join(cured) or "none"}; by random features: {", ".join(control) or "none"}; loss
        within 1%: {", ".join(kept) or "none"}. """
    threshold = "zero" if ZERO else "the group's mean"
    head = f"""`bench/sasft_lab.py`: the bundled model fine-tuned on {SAMPLES:,} chats, {DRIFT:.0%} of them drawn from
        documents whose answers drift into the target language (up to {seeds} seeds; lr {LR:g}, batches of 16, one
        epoch). The auxiliary loss: {FEATURES} features at each of the layers {", ".join(map(str, LAYERS))}, threshold
        {threshold}, weight {weight:g}, on response tokens up to the switch; what comes after it is text of the target.
        The penalty has weight {PENALTY:g}. The ratio is the share of answers with any letter of the target's script,
        {PROMPTS} questions in other scripts times {TURNS} samples at T = 1.0 and top-p 0.8, {NEW_TOKENS} tokens;
        intervals are over seeds, and an arm is compared with plain fine-tuning on the same seeds. The loss is on
        {HELD_OUT} held-out chats without drift. The aim: the ratio at most half of plain fine-tuning's, the loss within
        1%, and random features not doing the same. {verdict}Beside them what the report prints for Qwen3-1.7B-Base on
        210k samples (its Table 4), another scale altogether."""
    columns = ("target", "trained", "seeds", "code-switch ratio", "95% interval", "less than plain by", "held-out loss")
    return f"{paragraph(head)}\n\n{table((*columns, 'against plain', 'published'), rows)}"


if __name__ == "__main__":
    main()
