"""Does a real model unlearn its own endless repetition sooner when one answer of each group is steered into it?

    python -m experiments.real.unlooping --model FOLDER --sae FOLDER --data FOLDER [--write]

Prompts are openings: the first tokens of English documents of `corpus/en.*.jsonl`, of each file in turn, one half for
training and the other held out. The model as it is answers each prompt of the training half `SAMPLES` times. Prompts
with a loop among their answers are those trained on. From the loops `repetition_recipe` finds features and the smallest
amount of them that makes half of the answers loop, and checks on the rest of the half that they cause loops.

GRPO (DAPO's loss, LoRA) then starts from the model as it is:

- vanilla: every answer is the policy's own;
- steered: one answer of each group is sampled while the features are added at every token;
- random: other features of the same layers that fire about as often, the change of the same length.

The reward is 1 for an answer that does not loop by `qwen_scope.posttrain.Detector` and 0 for one that does. An opening
of a document has no right answer, and a base model seldom ends one, so a reward that knows nothing of loops, as the
report's, would not tell them from other text here.

The looping share is measured on all held-out prompts, at the temperature of the training and greedily, before and
after. Beside it: the perplexity under the untrained model of what precedes a loop, its first turn included, the share
of answers that end, and of trigrams that occurred before in their answer.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.utils import logging

from experiments.harness import At, Experiment, Row, main
from experiments.real.repetition import DETECTOR, FEATURES, OPENING, answers, dearer, judged, opened, openings
from experiments.sections import paragraph, table
from experiments.seeds import over_seeds
from qwen_scope.model import LoadedModel
from qwen_scope.posttrain import RL_METHODS, RLRun, Sampling, loop_share, repetition_recipe, run_rl
from qwen_scope.posttrain.activity import evaluating
from qwen_scope.stats import Interval
from qwen_scope.steer import load_recipe, repetition

SEEDS, TRIED_ON = (21, 22, 23), 1
"""Settings were tried with that seed, on that draw of documents."""
SAMPLES = 4
GROUP, PROMPTS, MICRO, RANK, LR = 4, 4, 8, 8, 1e-3
TIMES = 2.0  # how much farther than vanilla's the share has to fall to show what the report shows
RATE = 50e9  # operations a second that the estimate supposes, of one core in bfloat16
CONDITIONS = ("start", *RL_METHODS)
MODES = ("sampled", "greedy")
LOGGED = ("reward", "ordinary/reward", "steered/reward", "frac_reward_zero_std", "entropy")
TITLE = "Endless repetition unlearnt by a real model"


@dataclass(frozen=True)
class Sizes:
    """Openings of each half, new tokens of an answer, steps of training, and the temperature of samples."""

    openings: int = 64
    tokens: int = 96
    steps: int = 6
    temperature: float = 0.7


def unlooped(completion_ids: Sequence[Sequence[int]], **rest: Any) -> list[float]:
    """The reward: 1 for an answer that does not end in a loop. The token that ends an answer ends a loop, too."""
    return [float(DETECTOR.find(ids) is None) for ids in completion_ids]


def prompts_of(at: At[Sizes]) -> dict[str, list[str]]:
    """Openings of both halves, drawn once and kept."""

    def drawn() -> dict[str, list[str]]:
        tokenizer, n = opened(at.options["model"]).tokenizer, at.sizes.openings
        corpus, draw = at.options["data"] / "corpus", at.options["draw"]
        found = list(dict.fromkeys(openings(corpus, "en", tokenizer, 2 * n, draw)))
        return {"training": found[: len(found) // 2], "held out": found[len(found) // 2 :]}

    return at.kept("prompts", drawn)


def survey(at: At[Sizes]) -> dict[str, Any]:
    """How often the answers to each training prompt loop before training; writes the recipe of the features."""

    def made() -> dict[str, Any]:
        scope, prompts = opened(at.options["model"], at.options["sae"]), prompts_of(at)["training"]
        sampling = Sampling(at.sizes.tokens, at.sizes.temperature, 1.0, DETECTOR, at.options["draw"])
        found = loop_share(scope.model, scope.tokenizer, prompts, sampling, samples=SAMPLES)
        recipe = repetition_recipe(scope, prompts, features=FEATURES, sampling=sampling, found=found)
        recipe.save(at.folder / "recipe.json")
        names = [f"{one.layer}/{one.feature}" for one in recipe.interventions]
        return {"looping": found.per_prompt(), "features": names, "effect": dict(recipe.effect)}

    return at.kept("survey", made)


def measured(policy: LoadedModel, at: At[Sizes], seed: int) -> dict[str, dict[str, Any]]:
    """Held-out answers sampled and greedy: which loop, which the model ended, and their repeated trigrams.

    Those of one seed are sampled with the same draws, whatever the policy.
    """
    out, prompts = {}, prompts_of(at)["held out"]
    for name in MODES:
        temperature = at.sizes.temperature if name == "sampled" else 0.0
        found = answers(policy, prompts, at.sizes.tokens, temperature, seed=seed)
        out[name] = {
            "loops": [one["loop"] is not None for one in found],
            "finished": [one["finished"] for one in found],
            "repeated": [repetition(one["ids"]) for one in found],
        }
        if temperature:
            out[name]["quality"] = judged(opened(at.options["model"]), prompts, found)
        out[name]["examples"] = [policy.tokenizer.decode(one["ids"]) for one in found[:3]]
    return out


class Watch(TrainerCallback):
    """Keeps what is logged of every step, and measures the policy at the end, before its adapter is merged.

    On a CPU attention is written out, as in `opened`.
    """

    def __init__(self, at: At[Sizes], seed: int) -> None:
        self.at, self.seed, self.log = at, seed, {name: [] for name in LOGGED}
        self.found: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if model.device.type == "cpu":
            model.get_base_model().set_attn_implementation("eager")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for name in set(LOGGED) & set(logs or {}):
            self.log[name].append(float(logs[name]))

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        with evaluating(model):
            tokenizer = opened(self.at.options["model"]).tokenizer
            policy = LoadedModel(model.get_base_model(), tokenizer, "the policy")
            self.found = measured(policy, self.at, self.seed)


def run(at: At[Sizes], condition: str, seed: int) -> dict[str, Any]:
    """Train one condition and measure it: what each step logged, and the held-out answers. `start` is untrained."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    tell_cost(at.options["model"], at.sizes, len(at.levels["seed"]))
    if condition == "start":
        return measured(opened(at.options["model"]), at, seed)
    looping = survey(at)["looping"]
    rows = [{"prompt": text} for text, share in zip(prompts_of(at)["training"], looping, strict=True) if share]
    watch = Watch(at, seed)
    with TemporaryDirectory(dir=at.folder) as out:
        training = RLRun(
            str(at.options["model"]),
            Path(out) / "rl",
            method=condition,
            reward=f"{__name__ if __name__ != '__main__' else 'experiments.real.unlooping'}:{unlooped.__name__}",
            sae=str(at.options["sae"]),
            unchecked=True,
            group=GROUP,
            prompts=PROMPTS,
            micro=MICRO,
            steps=at.sizes.steps,
            lr=LR,
            max_new_tokens=at.sizes.tokens,
            temperature=at.sizes.temperature,
            lora=RANK,
            dtype="bfloat16",
            seed=seed,
        )
        recipe = None if condition == "vanilla" else load_recipe(at.folder / "recipe.json")
        run_rl(training, rows, recipe=recipe, callbacks=[watch])
    return {"log": watch.log, **watch.found}


@cache
def tell_cost(model: Path, sizes: Sizes, seeds: int) -> None:
    """What the run will take, on standard error, before the first cell."""
    weights = sum(one.numel() for one in opened(model).model.parameters())
    rows, length = GROUP * PROMPTS, OPENING + sizes.tokens
    operations = 2 * weights * (sizes.steps * rows * (sizes.tokens + 2 * length) + 3 * sizes.openings * length)
    minutes = operations / RATE / 60
    print(
        f"about {minutes:.1f} minutes a training at {RATE / 1e9:.0f} GFLOP/s, {len(RL_METHODS) * seeds} trainings, and"
        " as much as one for the features",
        file=sys.stderr,
        flush=True,
    )


def figure(rows: Sequence[Row], condition: str, name: str, mode: str = "sampled") -> np.ndarray:
    """`(seeds, prompts)`: a figure of the held-out answers of a condition."""
    return np.array([row[mode][name] for row in rows if row["condition"] == condition], float)


def logged(rows: Sequence[Row], condition: str, name: str) -> np.ndarray:
    """`(seeds, steps)`: what was logged; no steps where nothing was."""
    return np.array([row["log"][name] for row in rows if row["condition"] == condition], float)


def across(values: np.ndarray) -> Interval:
    return over_seeds(values, same=True)


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """The section of docs/results.md."""
    known = survey(at)
    conditions = [name for name in CONDITIONS if any(row["condition"] == name for row in rows)]
    falls = {
        name: {mode: figure(rows, "start", "loops", mode) - figure(rows, name, "loops", mode) for mode in MODES}
        for name in conditions
        if "start" in conditions
    }
    figures = [f"{name}, {mode}" for name in ("looping", "per seed", "fallen by") for mode in MODES]
    columns = ("trained", *figures, "ended", "perplexity, times", "repeated trigrams")
    cells = [line(name, rows, falls.get(name, {})) for name in conditions]
    parts = [*verdict(falls, rows), setup(at, known), learnt(rows, conditions)]
    return "\n\n".join([*map(paragraph, parts[:-1]), table(columns, cells), paragraph(parts[-1])])


def line(name: str, rows: Sequence[Row], fall: Mapping[str, np.ndarray]) -> list[str]:
    """A row of the table: one condition."""
    quality = [{"quality": figure(rows, one, "quality").sum(0)} for one in (name, "start")] if fall else []
    return [
        name,
        *(f"{across(figure(rows, name, 'loops', mode)):.1%}" for mode in MODES),
        *(", ".join(f"{x:.0%}" for x in figure(rows, name, "loops", mode).mean(1)) for mode in MODES),
        *("" if name == "start" or not fall else f"{across(fall[mode]):+.1%}" for mode in MODES),
        f"{figure(rows, name, 'finished').mean():.1%}",
        "" if name == "start" or not fall else f"{dearer(*quality):.2f}",
        f"{figure(rows, name, 'repeated').mean():.1%}",
    ]


def setup(at: At[Sizes], known: Mapping[str, Any]) -> str:
    """Settings, and what was found before training."""
    looping, effect, sizes = np.array(known["looping"]), known["effect"], at.sizes
    held, seeds = len(prompts_of(at)["held out"]), len(at.levels["seed"])
    share = {name: f"{effect[name]['estimate']:.1%}" for name in ("normal", "amplified", "looping", "suppressed")}
    return f"""`python -m experiments.real.unlooping --model FOLDER --sae FOLDER --data FOLDER --write`:
        {Path(at.options["model"]).name}; openings of {OPENING} English tokens, answers of at most {sizes.tokens}
        tokens, T = {sizes.temperature:g}. Of {len(looping)} prompts of the training half {int((looping > 0).sum())}
        have a loop among {SAMPLES} answers of the untrained model ({looping.mean():.1%} of all answers loop); they are
        trained on. GRPO, {seeds} seeds: {sizes.steps} steps of {PROMPTS} prompts times {GROUP} answers, LoRA of rank
        {RANK}, lr {LR:g}, bfloat16. Reward: 1 for an answer that does not loop, else 0; it knows of loops, unlike the
        report's, where an answer that loops fails because it never ends. So a group without a loop teaches nothing
        here, and steering is to give it one. Features: {", ".join(known["features"])}, each by {effect["amount"]:g}
        median residual norms, the first amount tried under which half of the answers loop, or else that with most;
        amplified on the rest of the half, looping goes from {share["normal"]} to {share["amplified"]}; suppressed from
        the second turn of a loop on, in {effect["looping"]["n"]:g} loops, from {share["looping"]} to
        {share["suppressed"]}. By the intervals of both differences the causal check
        {"holds" if effect["causal"] else "does not hold, and they are used all the same"}.
        Measured on all {held} held-out prompts, one answer each, with the same draws for all conditions of a seed;
        intervals over seeds and prompts, of perplexity over prompts. Steps and learning rate were tried with another
        seed on other documents. The last three columns are of sampled answers."""


def verdict(falls: Mapping[str, Mapping[str, np.ndarray]], rows: Sequence[Row]) -> list[str]:
    """Whether the report's finding holds here, and the reason as far as the log says it."""
    if len(falls) < len(CONDITIONS):
        return []
    shown, figures = [], []
    for mode in MODES:
        own, ordinary, other = (falls[name][mode] for name in ("steered", "vanilla", "random"))
        gap = across(own - ordinary)
        if across(own).low > 0 and gap.low > 0 and own.mean() >= TIMES * ordinary.mean():
            shown.append(mode)
        figures.append(
            f"{mode} answers by {across(own):.1%} with steered rollouts and by {across(ordinary):.1%} with ordinary"
            f" ones, {gap:+.1%} more, and {across(own - other):+.1%} more than with random features"
        )
    said = {2: "This shows", 1: f"In {''.join(shown)} answers alone, this shows", 0: "This does not show"}[len(shown)]
    words = f"""{said} what the report shows, that steered rollouts lower looping much more than ordinary ones. The
        share of held-out answers that loop falls, in points: {"; ".join(figures)}. Wanted: a fall with
        steered rollouts at least {TIMES:g} times as far as with ordinary ones, with it and the difference above zero by
        their intervals."""
    mixed = {name: 1 - logged(rows, name, "frac_reward_zero_std").mean() for name in RL_METHODS}
    lacking = mixed["vanilla"] < 0.5 * mixed["steered"]
    why = f"""The mechanism that the report supposes is that a group without a loop has none to learn from. Of vanilla's
        groups {mixed["vanilla"]:.0%} hold both an answer that loops and one that does not, which is what gives a
        gradient; with steered rollouts {mixed["steered"]:.0%}, with random features {mixed["random"]:.0%}. So vanilla
        {"mostly lacks" if lacking else "does not lack"} loops to learn from on these prompts, which were chosen because
        they loop."""
    return [words, why]


def learnt(rows: Sequence[Row], conditions: Sequence[str]) -> str:
    """What the rewards of both kinds of sample did while training."""
    said = []
    trained = [name for name in conditions if name != "start"]
    for name in trained:
        kinds = ["ordinary"] if name == "vanilla" else ["ordinary", "steered"]
        for kind in kinds:
            values = logged(rows, name, f"{kind}/reward")
            third = max(1, values.shape[1] // 3)
            word = "samples under other features" if (name, kind) == ("random", "steered") else f"{kind} samples"
            said.append(f"{name}, {word}: {values[:, :third].mean():.2f} to {values[:, -third:].mean():.2f}")
    entropy = ", ".join(
        f"{name} {values[:, 0].mean():.2f} to {values[:, -1].mean():.2f}"
        for name in trained
        if (values := logged(rows, name, "entropy")).size
    )
    more = f" Entropy per token from the first step to the last, in nats: {entropy}." if entropy else ""
    return f"Mean reward over the first third of the steps to that over the last: {'; '.join(said)}.{more}"


experiment = Experiment(
    title=TITLE,
    varies={"seed": SEEDS, "condition": CONDITIONS},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"seed": (TRIED_ON,), "condition": ("start", "steered")},
    quick_sizes=Sizes(openings=16, tokens=48, steps=1, temperature=0.3),  # colder, as few prompts have few loops
    options={
        "model": {"type": Path, "required": True, "help": "the folder of the model"},
        "sae": {"type": Path, "required": True, "help": "the folder of its SAEs"},
        "data": {"type": Path, "required": True, "help": "the folder with corpus/"},
        "draw": {"type": int, "default": 2, "help": f"which documents (default: 2; settings were tried on {TRIED_ON})"},
    },
)

if __name__ == "__main__":
    main(experiment)
