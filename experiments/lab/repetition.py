"""Steered rollouts against endless repetition on the lab: does one bad answer per group teach more than none?

    python -m experiments.lab.repetition [--seeds 21,22,23] [--shares 0.25] [--write]

The bundled model does not loop, so every seed makes a start model first: fine-tuned on chats of which a share get stuck
on their last two tokens. `repetition_recipe` finds its features of repetition and checks them causally. RL with steered
rollouts and its controls then start from it with the same prompts, steps and reward: vanilla, other features of the
same length, and `blind`, which is vanilla with loops that count as the rest of their group, so that they teach nothing.
Looping is measured on held-out questions before, along the way and after. All this is done for each share of chats that
get stuck: the rarer loops are, the less vanilla sees of them.

The start model and the recipe of a share and a seed are kept in SHARE/SEED of the folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from experiments.fine_tuning import QUIET
from experiments.harness import At, Experiment, Row, main
from experiments.sections import paragraph, table
from experiments.seeds import over_seeds
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

SENTENCES, BLOCK = 2, 2
START_LR, START_BATCH, START_SEED = 5e-4, 16, 900
SAMPLES, FEATURES = 8, 8
GROUP, PROMPTS, LR = 4, 8, 2e-5
NEW_TOKENS, TEMPERATURE = 64, 0.7
DETECTOR = Detector(longest=16, times=4, least=16)
MARK, END, IGNORED = "</think>\n\n", "<|im_end|>", -100
CONDITIONS = (*RL_METHODS, "blind")
TITLE = "Endless repetition on the lab"
PUBLISHED = """Published: the ratio falls sharply to a very low level in all three models, and only slightly with
    vanilla DAPO; the values of its Figure 22 were not available, and it has no random control."""


@dataclass(frozen=True)
class Sizes:
    """Chats and steps of the start model, questions behind the recipe, steps of RL, held-out questions per figure."""

    chats: int = 2400
    start_steps: int = 150
    asked: int = 384
    steps: int = 12
    every: int = 6
    held_out: int = 2048


def setup(sizes: Sizes) -> str:
    """What the section says first."""
    return f"""`python -m experiments.lab.repetition --write`: every seed makes its own start model, the bundled one
        fine-tuned on {sizes.chats:,} chats of at most {SENTENCES} sentences ({sizes.start_steps} steps of
        {START_BATCH}, lr {START_LR:g}), of which a share repeat their last {BLOCK} tokens to the limit of
        {NEW_TOKENS}; finds its own {FEATURES} features of repetition and their amount; and runs every condition from
        there: {sizes.steps} steps of {PROMPTS} questions times {GROUP} answers, lr {LR:g}, T = {TEMPERATURE}, no
        top-p, reward 1 for an answer that ends and is in the language of the question. Looping is measured on
        {sizes.held_out:,} held-out questions per figure; intervals are over seeds and prompts. The aim: steered
        rollouts lower the looping share at least twice as much as vanilla in the same number of steps. The method of
        finding features and amounts, the learning rate and the steps were chosen on other start models."""


def chats(seed: int, stuck: float, tokenizer: Any, n: int) -> Iterator[dict[str, list[int]]]:
    """Chats of at most two sentences as token ids; a share of them repeat their last tokens to the limit, unended."""
    rng = np.random.default_rng(seed)
    mixture = replace(default_mixture(), chat={"topic": 1.0})
    for document in documents(seed=2000 + seed, n=n, kinds=["chat"], mixture=mixture):
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


def make_start(folder: Path, stuck: float, seed: int, sizes: Sizes) -> None:
    """The bundled model, fine-tuned until it sometimes loops."""
    loaded = load_model(model_source("lab"), device="cpu")
    loaded.model.requires_grad_(True)
    settings = SFTConfig(
        str(folder / "trainer"),
        learning_rate=START_LR,
        per_device_train_batch_size=START_BATCH,
        warmup_steps=2,
        lr_scheduler_type="cosine",
        max_steps=sizes.start_steps,
        seed=START_SEED + seed,
        **QUIET,
    )
    rows = Dataset.from_list(list(chats(START_SEED + seed, stuck, loaded.tokenizer, sizes.chats)))
    trainer = SFTTrainer(loaded.model, settings, train_dataset=rows, processing_class=loaded.tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def sampling(seed: int) -> Sampling:
    return Sampling(NEW_TOKENS, TEMPERATURE, 1.0, DETECTOR, seed)


def make_recipe(start: Path, seed: int, n: int) -> Recipe:
    """The features of repetition, sought on questions that neither training nor the measurement asks."""
    asked = [row["prompt"] for row in lab_rows(n, 7700 + seed, sums=0.0)]
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

    def __init__(self, tokenizer: Any, seed: int, sizes: Sizes) -> None:
        self.tokenizer, self.seed, self.every = tokenizer, seed, sizes.every
        self.rows = lab_rows(sizes.held_out, 9000 + seed, split="heldout_sentences", sums=0.0)
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
        if state.global_step % self.every == 0:
            with evaluating(model):
                self.measure(state.global_step, model)


def started(at: At[Sizes], share: float, seed: int) -> Path:
    """The folder with the start model and the recipe of a seed, made where it lacks them."""
    folder = at.folder / f"{share:g}" / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "start" / "config.json").is_file():
        make_start(folder / "start", share, seed, at.sizes)
    if not (folder / "recipe.json").is_file():
        make_recipe(folder / "start", seed, at.sizes.asked).save(folder / "recipe.json")
    return folder


def run(at: At[Sizes], share: float, seed: int, condition: str) -> dict[str, Any]:
    """Train one condition: the curve and rewards while training. `start` is the untrained model."""
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    keep = started(at, share, seed)
    loaded = load_model(str(keep / "start"), device="cpu")
    curve = Curve(loaded.tokenizer, seed, at.sizes)
    metrics: dict[str, Any] = {}
    if condition == "start":
        curve.measure(0, loaded.model)
    else:
        training = RLRun(
            str(keep / "start"),
            keep / f"rl-{condition}",
            method="vanilla" if condition == "blind" else condition,
            reward="experiments.lab.repetition:blind" if condition == "blind" else "lab",
            sae="lab",
            unchecked=True,
            group=GROUP,
            prompts=PROMPTS,
            micro=GROUP * PROMPTS,
            steps=at.sizes.steps,
            lr=LR,
            max_new_tokens=NEW_TOKENS,
            temperature=TEMPERATURE,
            detector=DETECTOR,
            device="cpu",
            seed=seed,
        )
        rows = lab_rows(400, 300 + seed, sums=0.0)
        recipe = None if condition in {"vanilla", "blind"} else load_recipe(keep / "recipe.json")
        metrics = run_rl(training, rows, (), recipe, callbacks=[curve])
    return {"points": curve.points, **metrics}


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """The section of docs/results.md."""
    parts = [paragraph(setup(at.sizes))]
    for share in at.levels["share"]:
        recipes = [load_recipe(started(at, share, seed) / "recipe.json") for seed in at.levels["seed"]]
        parts += compared(share, [row for row in rows if row["share"] == share], recipes, at.sizes)
    return "\n\n".join((*parts, paragraph(PUBLISHED)))


def loops_of(runs: Sequence[Row], condition: str, step: int) -> np.ndarray:
    """`(seeds, prompts)`: which answers loop."""
    found = [p["loops"] for run in runs if run["condition"] == condition for p in run["points"] if p["step"] == step]
    return np.array(found, float)


def compared(stuck: float, runs: Sequence[Row], recipes: Sequence[Recipe], sizes: Sizes) -> list[str]:
    """What the section says of one share of stuck chats."""
    before = loops_of(runs, "start", 0)
    conditions = [name for name in CONDITIONS if any(run["condition"] == name for run in runs)]
    each = ", ".join(f"{value:.2%}" for value in before.mean(1))
    rows = [("start", "0", f"{over_seeds(before):.2%}", each, "", *means(runs, "start", 0))]
    for step in range(sizes.every, sizes.steps + 1, sizes.every):
        for condition in conditions:
            left = loops_of(runs, condition, step)
            each = ", ".join(f"{value:.2%}" for value in left.mean(1))
            rows.append(
                (
                    condition, str(step), f"{over_seeds(left):.2%}", each, f"{over_seeds(before - left):.2%}",
                    *means(runs, condition, step),
                )
            )  # fmt: skip
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
    steps = range(sizes.every, sizes.steps + 1, sizes.every)
    said = (
        []
        if len(conditions) < len(CONDITIONS)
        else [
            verdict(step, {condition: before - loops_of(runs, condition, step) for condition in conditions})
            for step in steps
        ]
    )
    return [paragraph(head), table(columns, rows), paragraph(" ".join(said))]


def means(runs: Sequence[Row], condition: str, step: int) -> tuple[str, str]:
    """Over seeds, the share of answers that ended and the reward."""
    found = [p for run in runs if run["condition"] == condition for p in run["points"] if p["step"] == step]
    return f"{np.mean([p['finished'] for p in found]):.1%}", f"{np.mean([p['reward'] for p in found]):.3f}"


def verdict(step: int, fall: dict[str, np.ndarray]) -> str:
    """Whether the aim is met after `step` steps."""
    said = []
    for condition in ("vanilla", "random", "blind"):
        against, own = fall[condition].mean(), fall["steered"].mean()
        times = (
            f"{own / against:.1f} times as large" if against > 0 else f"not a ratio, as {condition} does not lower it"
        )
        twice = f"{over_seeds(fall['steered'] - 2 * fall[condition]):.2%}"
        said.append(f"with {condition}, {times} (minus twice the other's fall, in points: {twice})")
    part = fall["blind"].mean() / fall["vanilla"].mean()
    return f"""After {step} steps, the fall of the looping share under steered rollouts is, compared {"; ".join(said)}.
        Under blind, which learns nothing from loops, the share falls {part:.0%} as far as under vanilla: that part
        comes from what the policy learns elsewhere."""


experiment = Experiment(
    title=TITLE,
    varies={"share": (0.25,), "seed": (21, 22, 23), "condition": ("start", *CONDITIONS)},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"share": (0.5,), "seed": (1,)},
    quick_sizes=Sizes(chats=1200, start_steps=75, asked=48, steps=2, every=1, held_out=32),
)

if __name__ == "__main__":
    main(experiment)
