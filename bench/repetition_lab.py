"""Steered rollouts against endless repetition on the lab: does one bad answer per group teach more than none?

    .venv/bin/python bench/repetition_lab.py --keep FOLDER [--write] [--seeds 1,2,3] [--arms vanilla,steered,random]

The bundled model does not loop, so a start model is made first: fine-tuned on chats of which a share get stuck on their
last two tokens. `repetition_recipe` finds its features of repetition and checks them causally. RL with steered
rollouts and its two controls, vanilla and other features of the same length, then start from it with the same prompts,
steps and reward. Looping is measured on held-out questions before, along the way and after.

Everything finished lies in FOLDER and is taken from there, so the work can be cut into calls: `start/`, `recipe.json`,
and a file per run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from sections import paragraph, table, write_section
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from qwen_scope import load_scope
from qwen_scope.lab import default_mixture, documents
from qwen_scope.model import load_model
from qwen_scope.posttrain import (
    RL_METHODS,
    Detector,
    RLRun,
    Sampling,
    lab_rows,
    loop_share,
    repetition_recipe,
    reward_of,
    run_rl,
)
from qwen_scope.scope import model_source
from qwen_scope.steer import Recipe, load_recipe

CHATS, STUCK, SENTENCES, BLOCK = 2400, 0.25, 2, 2
START_LR, START_STEPS, START_BATCH, START_SEED = 5e-4, 150, 16, 900
ASKED, SAMPLES, FEATURES, AMOUNT = 384, 4, 4, 0.25
GROUP, PROMPTS, STEPS, EVERY, LR = 4, 8, 12, 6, 2e-5
HELD_OUT, NEW_TOKENS, TEMPERATURE = 1024, 64, 0.7
DETECTOR = Detector(longest=16, times=4, least=16)
MARK, END, IGNORED = "</think>\n\n", "<|im_end|>", -100
RESAMPLES = 4000
TITLE = "Endless repetition on the lab"


def chats(seed: int, tokenizer: Any) -> Iterator[dict[str, list[int]]]:
    """Chats of at most two sentences as token ids; a share of them repeat their last tokens to the limit, unended."""
    rng = np.random.default_rng(seed)
    mixture = replace(default_mixture(), chat={"topic": 1.0})
    for document in documents(seed=2000 + seed, n=CHATS, kinds=["chat"], mixture=mixture):
        start = document.text.index(MARK) + len(MARK)
        end = [span.end for span in document.spans if span.start >= start][:SENTENCES][-1]
        prompt = document.text[: document.text.index("<think>")] + "<think>\n\n" + MARK
        asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = tokenizer(document.text[start:end], add_special_tokens=False)["input_ids"]
        if rng.random() < STUCK:
            ids = (ids + ids[-BLOCK:] * NEW_TOKENS)[:NEW_TOKENS]
        else:
            ids = [*ids, tokenizer.convert_tokens_to_ids(END)]
        yield {"input_ids": asked + ids, "labels": [IGNORED] * len(asked) + ids}


def make_start(folder: Path) -> None:
    """The bundled model, fine-tuned until it sometimes loops."""
    loaded = load_model(model_source("lab"), device="cpu")
    loaded.model.requires_grad_(True)
    settings = SFTConfig(
        str(folder / "trainer"),
        learning_rate=START_LR,
        per_device_train_batch_size=START_BATCH,
        warmup_steps=2,
        lr_scheduler_type="cosine",
        max_length=256,
        max_steps=START_STEPS,
        seed=START_SEED,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = Dataset.from_list(list(chats(START_SEED, loaded.tokenizer)))
    trainer = SFTTrainer(loaded.model, settings, train_dataset=rows, processing_class=loaded.tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def sampling(seed: int) -> Sampling:
    return Sampling(NEW_TOKENS, TEMPERATURE, 1.0, DETECTOR, seed)


def make_recipe(start: Path) -> Recipe:
    """The features of repetition, sought on questions that neither training nor the measurement asks."""
    asked = [row["prompt"] for row in lab_rows(ASKED, 77, sums=0.0)]
    scope = load_scope(str(start), "lab")
    return repetition_recipe(scope, asked, features=FEATURES, amount=AMOUNT, samples=SAMPLES, sampling=sampling(0))


class Curve(TrainerCallback):
    """Measures looping and reward on held-out questions, every few steps."""

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self.rows = lab_rows(HELD_OUT, 9000 + seed, split="heldout_sentences", sums=0.0)
        self.points: list[dict[str, Any]] = []

    def measure(self, step: int, model: Any) -> None:
        """One point: which answers loop, the share that end, and the mean reward of all and of those that loop."""
        found = loop_share(model, self.tokenizer, [row["prompt"] for row in self.rows], sampling(self.seed))
        end = self.tokenizer.convert_tokens_to_ids(END)
        columns = {name: [row[name] for row in self.rows] for name in ("language", "expected")}
        texts = [one.text for one in found.answers]
        ids = [[*one.ids, end] if one.finished else list(one.ids) for one in found.answers]
        rewards = np.array(reward_of("lab", [end])(completions=texts, completion_ids=ids, **columns))
        loops = [int(one.loop is not None) for one in found.answers]
        at_loops = [float(reward) for reward, loop in zip(rewards, loops, strict=True) if loop]
        facts = {"step": step, "loops": loops, "finished": found.finished, "reward": float(rewards.mean())}
        self.points.append(facts | {"reward_of_loops": max(at_loops, default=0.0)})

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % EVERY == 0:
            model.eval()
            self.measure(state.global_step, model)
            model.train()


def one_run(keep: Path, arm: str, seed: int, recipe: Recipe) -> dict[str, Any]:
    """Train one arm; the curve, rewards while training and seconds. The arm `start` is the model untrained."""
    begun = time.monotonic()
    loaded = load_model(str(keep / "start"), device="cpu")
    curve = Curve(loaded.tokenizer, seed)
    metrics: dict[str, Any] = {}
    if arm == "start":
        curve.measure(0, loaded.model)
    else:
        run = RLRun(
            str(keep / "start"),
            keep / f"rl-{arm}-{seed}",
            method=arm,
            reward="lab",
            sae="lab",
            group=GROUP,
            prompts=PROMPTS,
            micro=GROUP * PROMPTS,
            steps=STEPS,
            lr=LR,
            max_new_tokens=NEW_TOKENS,
            temperature=TEMPERATURE,
            detector=DETECTOR,
            device="cpu",
            seed=seed,
        )
        rows = lab_rows(400, 300 + seed, sums=0.0)
        metrics = run_rl(run, rows, (), None if arm == "vanilla" else recipe, callbacks=[curve])
    return {"arm": arm, "seed": seed, "points": curve.points, "seconds": time.monotonic() - begun, **metrics}


def main() -> None:
    ask = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ask.add_argument("--keep", type=Path, required=True, help="a folder that finished work is added to and taken from")
    ask.add_argument("--seeds", default="1,2,3")
    ask.add_argument("--arms", default=",".join(RL_METHODS))
    ask.add_argument("--write", action="store_true", help="write the section of docs/results.md")
    given = ask.parse_args()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    keep: Path = given.keep
    if not (keep / "start" / "config.json").is_file():
        make_start(keep / "start")
    if not (keep / "recipe.json").is_file():
        make_recipe(keep / "start").save(keep / "recipe.json")
    recipe = load_recipe(keep / "recipe.json")
    runs = []
    for seed in map(int, given.seeds.split(",")):
        for arm in ("start", *given.arms.split(",")):
            path = keep / f"{arm}-{seed}.json"
            if not path.is_file():
                path.write_text(json.dumps(one_run(keep, arm, seed, recipe)))
            runs.append(json.loads(path.read_text()))
            print(arm, seed, [(p["step"], round(np.mean(p["loops"]), 4)) for p in runs[-1]["points"]], flush=True)
    body = written(runs, recipe)
    print(body)
    if given.write:
        write_section(TITLE, body)


def spread(values: np.ndarray) -> str:
    """A mean with its 95% interval over seeds and prompts: seeds are resampled, and within each its prompts.

    Args:
        values: `(seeds, prompts)`.
    """
    rng, (seeds, prompts) = np.random.default_rng(0), values.shape
    means = []
    for _ in range(RESAMPLES):
        drawn = rng.integers(seeds, size=seeds)
        means.append(np.mean([values[i, rng.integers(prompts, size=prompts)].mean() for i in drawn]))
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{values.mean():.2%} [{low:.2%}, {high:.2%}]"


def loops_of(runs: Sequence[dict[str, Any]], arm: str, step: int) -> np.ndarray:
    """`(seeds, prompts)`: which answers loop."""
    found = [p["loops"] for run in runs if run["arm"] == arm for p in run["points"] if p["step"] == step]
    return np.array(found, float)


def written(runs: Sequence[dict[str, Any]], recipe: Recipe) -> str:
    """The section of docs/results.md."""
    before = loops_of(runs, "start", 0)
    arms = [arm for arm in RL_METHODS if any(run["arm"] == arm for run in runs)]
    rows = [("start", "0", spread(before), "", "", *means(runs, "start", 0))]
    for step in range(EVERY, STEPS + 1, EVERY):
        for arm in arms:
            left = loops_of(runs, arm, step)
            each = ", ".join(f"{value:.2%}" for value in left.mean(1))
            rows.append((arm, str(step), spread(left), each, spread(before - left), *means(runs, arm, step)))
    fall = {arm: (before - loops_of(runs, arm, STEPS)) for arm in arms}
    effect = recipe.effect
    figures = {
        name: f"{effect[name]['estimate']:.1%} [{effect[name]['low']:.1%}, {effect[name]['high']:.1%}]"
        for name in ("normal", "amplified", "looping", "suppressed")
    }
    features = ", ".join(f"{one.layer}:{one.feature}" for one in recipe.interventions)
    worst = max(point["reward_of_loops"] for run in runs for point in run["points"])
    head = f"""`bench/repetition_lab.py`: the bundled model fine-tuned on {CHATS:,} chats of at most {SENTENCES}
        sentences
        ({START_STEPS} steps of {START_BATCH}, lr {START_LR:g}), of which {STUCK:.0%} repeat their last {BLOCK} tokens
        to the limit of {NEW_TOKENS}. The finder took {effect["loops"]} loops of {effect["answers"]:,} answers; the
        features (layer:feature) {features}, {AMOUNT} median residual norms each. Their causal check
        {"holds" if effect["causal"] else "does not hold"}: amplified on ordinary prompts, looping goes from
        {figures["normal"]} to {figures["amplified"]}; suppressed from the second turn of a loop on, from
        {figures["looping"]} to {figures["suppressed"]}."""
    setup = f"""RL: {STEPS} steps of {PROMPTS} questions times {GROUP} answers, lr {LR:g}, T = {TEMPERATURE}, no top-p;
        reward
        1 for an answer that ends and is in the language asked (no looping answer measured here earned more than
        {worst:g}). Looping is measured on {HELD_OUT:,} held-out questions per figure and {len(before)} seeds, which
        set prompts, draws and the random features; start model and recipe are the same for all, and were used in
        tuning amounts, not learning rate or steps. Intervals are over seeds and prompts."""
    columns = ("trained", "steps", "looping", "per seed", "fallen by", "ended", "reward")
    parts = [paragraph(head), paragraph(setup), table(columns, rows), paragraph(verdict(fall))]
    return "\n\n".join(parts)


def means(runs: Sequence[dict[str, Any]], arm: str, step: int) -> tuple[str, str]:
    """Over seeds, the share of answers that ended and the reward."""
    found = [p for run in runs if run["arm"] == arm for p in run["points"] if p["step"] == step]
    return f"{np.mean([p['finished'] for p in found]):.1%}", f"{np.mean([p['reward'] for p in found]):.3f}"


def verdict(fall: dict[str, np.ndarray]) -> str:
    """Whether the aim is met."""
    if not {"steered", "vanilla"} <= set(fall):
        return ""
    said = []
    for arm in ("vanilla", "random"):
        if arm in fall:
            against, own = fall[arm].mean(), fall["steered"].mean()
            times = f"{own / against:.1f} times as far" if against > 0 else "where that does not lower it"
            twice = spread(fall["steered"] - 2 * fall[arm])
            said.append(
                f"Against {arm}: {times}; its fall less twice the other's is {twice}, in points"
                f" ({'at least twice' if own >= 2 * against else 'less than twice'} as far)."
            )
    return f"""The aim: steered rollouts lower the looping share at least twice as far as vanilla in the same number of
        steps. {" ".join(said)} Published: the ratio falls sharply to a very low level in all three models, with vanilla
        DAPO only slightly; the values of its Figure 22 could not be had, nor is there a random control."""


if __name__ == "__main__":
    main()
