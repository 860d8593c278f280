"""Steered rollouts against endless repetition on the lab: does one bad answer per group teach more than none?

    .venv/bin/python bench/repetition_lab.py --keep FOLDER [--write] [--seeds 21,22,23] [--stuck 0.25]

The bundled model does not loop, so every seed makes a start model first: fine-tuned on chats of which a share get stuck
on their last two tokens. `repetition_recipe` finds its features of repetition and checks them causally. RL with steered
rollouts and its controls then start from it with the same prompts, steps and reward: vanilla, other features of the
same length, and `blind`, which is vanilla with loops that count as the rest of their group, so that they teach nothing.
Looping is measured on held-out questions before, along the way and after. All this is done for each share of chats that
get stuck: the rarer loops are, the less vanilla sees of them.

Everything finished lies in FOLDER/SHARE/SEED and is taken from there, so the work can be cut into calls: `start/`,
`recipe.json`, and a file per condition.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from fine_tuning import QUIET
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
from qwen_scope.posttrain.activity import evaluating
from qwen_scope.scope import model_source
from qwen_scope.steer import Recipe, load_recipe

CHATS, SENTENCES, BLOCK = 2400, 2, 2
START_LR, START_STEPS, START_BATCH, START_SEED = 5e-4, 150, 16, 900
ASKED, SAMPLES, FEATURES = 384, 8, 8
GROUP, PROMPTS, STEPS, EVERY, LR = 4, 8, 12, 6, 2e-5
HELD_OUT, NEW_TOKENS, TEMPERATURE = 2048, 64, 0.7
DETECTOR = Detector(longest=16, times=4, least=16)
MARK, END, IGNORED = "</think>\n\n", "<|im_end|>", -100
RESAMPLES = 4000
ARMS = (*RL_METHODS, "blind")
TITLE = "Endless repetition on the lab"
SETUP = f"""`bench/repetition_lab.py`: every seed makes its own start model, the bundled one fine-tuned on {CHATS:,}
    chats of at most {SENTENCES} sentences ({START_STEPS} steps of {START_BATCH}, lr {START_LR:g}), of which a share
    repeat their last {BLOCK} tokens to the limit of {NEW_TOKENS}; finds its own {FEATURES} features of repetition and
    their amount; and runs every condition from there: {STEPS} steps of {PROMPTS} questions times {GROUP} answers, lr
    {LR:g}, T = {TEMPERATURE}, no top-p, reward 1 for an answer that ends and is in the language asked. Looping is
    measured on {HELD_OUT:,} held-out questions per figure; intervals are over seeds and prompts. The aim: steered
    rollouts lower the looping share at least twice as far as vanilla in the same number of steps. The way features and
    amounts are found, learning rate and steps were chosen on other start models."""
PUBLISHED = """Published: the ratio falls sharply to a very low level in all three models, with vanilla DAPO only
    slightly; the values of its Figure 22 could not be had, nor is there a random control."""


def chats(seed: int, stuck: float, tokenizer: Any) -> Iterator[dict[str, list[int]]]:
    """Chats of at most two sentences as token ids; a share of them repeat their last tokens to the limit, unended."""
    rng = np.random.default_rng(seed)
    mixture = replace(default_mixture(), chat={"topic": 1.0})
    for document in documents(seed=2000 + seed, n=CHATS, kinds=["chat"], mixture=mixture):
        start = document.text.index(MARK) + len(MARK)
        end = [span.end for span in document.spans if span.start >= start][:SENTENCES][-1]
        prompt = document.text[: document.text.index("<think>")] + "<think>\n\n" + MARK
        asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = tokenizer(document.text[start:end], add_special_tokens=False)["input_ids"]
        if rng.random() < stuck:
            ids = (ids + ids[-BLOCK:] * NEW_TOKENS)[:NEW_TOKENS]
        else:
            ids = [*ids, tokenizer.convert_tokens_to_ids(END)]
        yield {"input_ids": asked + ids, "labels": [IGNORED] * len(asked) + ids}


def make_start(folder: Path, stuck: float, seed: int) -> None:
    """The bundled model, fine-tuned until it sometimes loops."""
    loaded = load_model(model_source("lab"), device="cpu")
    loaded.model.requires_grad_(True)
    settings = SFTConfig(
        str(folder / "trainer"),
        learning_rate=START_LR,
        per_device_train_batch_size=START_BATCH,
        warmup_steps=2,
        lr_scheduler_type="cosine",
        max_steps=START_STEPS,
        seed=START_SEED + seed,
        **QUIET,
    )
    rows = Dataset.from_list(list(chats(START_SEED + seed, stuck, loaded.tokenizer)))
    trainer = SFTTrainer(loaded.model, settings, train_dataset=rows, processing_class=loaded.tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def sampling(seed: int) -> Sampling:
    return Sampling(NEW_TOKENS, TEMPERATURE, 1.0, DETECTOR, seed)


def make_recipe(start: Path, seed: int) -> Recipe:
    """The features of repetition, sought on questions that neither training nor the measurement asks."""
    asked = [row["prompt"] for row in lab_rows(ASKED, 7700 + seed, sums=0.0)]
    scope = load_scope(str(start), "lab")
    return repetition_recipe(scope, asked, features=FEATURES, samples=SAMPLES, sampling=sampling(7700 + seed))


def blind(completion_ids: list[list[int]], **asked: Any) -> list[float]:
    """The lab's reward, but what loops gets the mean of its group's other answers: loops teach nothing."""
    columns = {name: asked[name] for name in ("completions", "language", "expected")}
    rewards = np.array(lab_reward()(completion_ids=completion_ids, **columns)).reshape(-1, GROUP)
    loops = np.array([DETECTOR.find(ids) is not None for ids in completion_ids]).reshape(-1, GROUP)
    for group, looping in zip(rewards, loops, strict=True):
        group[looping] = group[~looping].mean() if not looping.all() else 0.0
    return rewards.ravel().tolist()


@cache
def lab_reward() -> Any:
    tokenizer = load_model(model_source("lab"), device="cpu").tokenizer
    return reward_of("lab", [tokenizer.convert_tokens_to_ids(END)])


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
        rewards = np.array(lab_reward()(completions=texts, completion_ids=ids, **columns))
        loops = [int(one.loop is not None) for one in found.answers]
        at_loops = [float(reward) for reward, loop in zip(rewards, loops, strict=True) if loop]
        facts = {"step": step, "loops": loops, "finished": found.finished, "reward": float(rewards.mean())}
        self.points.append(facts | {"reward_of_loops": max(at_loops, default=0.0)})

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % EVERY == 0:
            with evaluating(model):
                self.measure(state.global_step, model)


def one_run(keep: Path, condition: str, seed: int, recipe: Recipe) -> dict[str, Any]:
    """Train one condition; the curve, rewards while training and seconds. `start` is the untrained model."""
    begun = time.monotonic()
    loaded = load_model(str(keep / "start"), device="cpu")
    curve = Curve(loaded.tokenizer, seed)
    metrics: dict[str, Any] = {}
    if condition == "start":
        curve.measure(0, loaded.model)
    else:
        run = RLRun(
            str(keep / "start"),
            keep / f"rl-{condition}",
            method="vanilla" if condition == "blind" else condition,
            reward="repetition_lab:blind" if condition == "blind" else "lab",
            sae="lab",
            unchecked=True,
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
        metrics = run_rl(run, rows, (), None if condition in {"vanilla", "blind"} else recipe, callbacks=[curve])
    return {
        "condition": condition,
        "seed": seed,
        "points": curve.points,
        "seconds": time.monotonic() - begun,
        **metrics,
    }


def runs_of(keep: Path, stuck: float, seed: int) -> list[dict[str, Any]]:
    """Start model, recipe and conditions of one seed, made where the folder lacks them."""
    keep.mkdir(parents=True, exist_ok=True)
    if not (keep / "start" / "config.json").is_file():
        make_start(keep / "start", stuck, seed)
    if not (keep / "recipe.json").is_file():
        make_recipe(keep / "start", seed).save(keep / "recipe.json")
    runs = []
    for condition in ("start", *ARMS):
        path = keep / f"{condition}.json"
        if not path.is_file():
            path.write_text(json.dumps(one_run(keep, condition, seed, load_recipe(keep / "recipe.json"))))
        runs.append(json.loads(path.read_text()))
        print(
            stuck, seed, condition, [(p["step"], round(np.mean(p["loops"]), 4)) for p in runs[-1]["points"]], flush=True
        )
    return runs


def main() -> None:
    ask = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ask.add_argument("--keep", type=Path, required=True, help="a folder that finished work is added to and taken from")
    ask.add_argument("--stuck", default="0.25", help="shares of chats that get stuck in the start's training")
    ask.add_argument("--seeds", default="21,22,23")
    ask.add_argument("--write", action="store_true", help="write the section of docs/results.md")
    given = ask.parse_args()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    parts = [paragraph(SETUP)]
    for stuck in map(float, given.stuck.split(",")):
        folders = {seed: given.keep / f"{stuck:g}" / str(seed) for seed in seeds}
        runs = [run for seed, keep in folders.items() for run in runs_of(keep, stuck, seed)]
        parts += written(stuck, runs, [load_recipe(keep / "recipe.json") for keep in folders.values()])
    body = "\n\n".join((*parts, paragraph(PUBLISHED)))
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


def loops_of(runs: Sequence[dict[str, Any]], condition: str, step: int) -> np.ndarray:
    """`(seeds, prompts)`: which answers loop."""
    found = [p["loops"] for run in runs if run["condition"] == condition for p in run["points"] if p["step"] == step]
    return np.array(found, float)


def written(stuck: float, runs: Sequence[dict[str, Any]], recipes: Sequence[Recipe]) -> list[str]:
    """What the section says of one share of stuck chats."""
    before = loops_of(runs, "start", 0)
    each = ", ".join(f"{value:.2%}" for value in before.mean(1))
    rows = [("start", "0", spread(before), each, "", *means(runs, "start", 0))]
    for step in range(EVERY, STEPS + 1, EVERY):
        for condition in ARMS:
            left = loops_of(runs, condition, step)
            each = ", ".join(f"{value:.2%}" for value in left.mean(1))
            rows.append(
                (condition, str(step), spread(left), each, spread(before - left), *means(runs, condition, step))
            )
    effects = [recipe.effect for recipe in recipes]
    figures = {
        name: ", ".join(f"{effect[name]['estimate']:.1%}" for effect in effects)
        for name in ("normal", "amplified", "looping", "suppressed")
    }
    worst = max(point["reward_of_loops"] for run in runs for point in run["points"])
    head = f"""**{stuck:.0%} of chats stuck.** The finder took {", ".join(str(effect["loops"]) for effect in effects)}
        loops of {effects[0]["answers"]:,} answers. The causal check holds for
        {sum(bool(effect["causal"]) for effect in effects)} of {len(effects)} recipes: amplified on ordinary prompts,
        looping goes from {figures["normal"]} to {figures["amplified"]}; suppressed from the second turn of a loop on,
        from {figures["looping"]} to {figures["suppressed"]}. No looping answer measured here earned more than
        {worst:g}. Amounts, in median residual norms: {", ".join(str(effect["amount"]) for effect in effects)}."""
    columns = ("trained", "steps", "looping", "per seed", "fallen by", "ended", "reward")
    steps = range(EVERY, STEPS + 1, EVERY)
    said = [
        verdict(step, {condition: before - loops_of(runs, condition, step) for condition in ARMS}) for step in steps
    ]
    return [paragraph(head), table(columns, rows), paragraph(" ".join(said))]


def means(runs: Sequence[dict[str, Any]], condition: str, step: int) -> tuple[str, str]:
    """Over seeds, the share of answers that ended and the reward."""
    found = [p for run in runs if run["condition"] == condition for p in run["points"] if p["step"] == step]
    return f"{np.mean([p['finished'] for p in found]):.1%}", f"{np.mean([p['reward'] for p in found]):.3f}"


def verdict(step: int, fall: dict[str, np.ndarray]) -> str:
    """Whether the aim is met after so many steps."""
    said = []
    for condition in ("vanilla", "random", "blind"):
        against, own = fall[condition].mean(), fall["steered"].mean()
        times = f"{own / against:.1f} times as far" if against > 0 else "where that does not lower it"
        twice = spread(fall["steered"] - 2 * fall[condition])
        said.append(f"against {condition} {times} (less twice the other's fall, in points: {twice})")
    part = fall["blind"].mean() / fall["vanilla"].mean()
    return f"""After {step} steps, steered rollouts have lowered the looping share, {"; ".join(said)}. Blind, to which
        loops teach nothing, falls {part:.0%} as far as vanilla: so much comes with what the policy learns elsewhere."""


if __name__ == "__main__":
    main()
