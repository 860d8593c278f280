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
SAMPLES, TEMPERATURE = 4, 0.7
GROUP, PROMPTS, MICRO, RANK, LR = 4, 4, 8, 8, 1e-3
TIMES = 2.0  # how much farther than vanilla's the share has to fall to show what the report shows
RATE = 50e9  # operations a second that the estimate supposes, of one core in bfloat16
MODES = {"sampled": TEMPERATURE, "greedy": 0.0}
LOGGED = ("reward", "ordinary/reward", "steered/reward", "frac_reward_zero_std", "entropy")
TITLE = "Endless repetition unlearnt by a real model"


@dataclass(frozen=True)
class Sizes:
    """Openings of each half, new tokens of an answer, steps of training."""

    openings: int = 64
    tokens: int = 96
    steps: int = 12


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
        sampling = Sampling(at.sizes.tokens, TEMPERATURE, 1.0, DETECTOR, at.options["draw"])
        found = loop_share(scope.model, scope.tokenizer, prompts, sampling, samples=SAMPLES)
        recipe = repetition_recipe(scope, prompts, features=FEATURES, sampling=sampling, found=found)
        recipe.save(at.folder / "recipe.json")
        names = [f"{one.layer}/{one.feature}" for one in recipe.interventions]
        return {"looping": found.per_prompt(), "features": names, "effect": dict(recipe.effect)}

    return at.kept("survey", made)


def measured(policy: LoadedModel, at: At[Sizes]) -> dict[str, dict[str, Any]]:
    """Held-out answers sampled and greedy: which loop, which the model ended, and their repeated trigrams."""
    out, prompts = {}, prompts_of(at)["held out"]
    for name, temperature in MODES.items():
        found = answers(policy, prompts, at.sizes.tokens, temperature)
        out[name] = {
            "loops": [one["loop"] is not None for one in found],
            "finished": [one["finished"] for one in found],
            "repeated": [repetition(one["ids"]) for one in found],
        }
        if temperature:
            out[name]["quality"] = judged(opened(at.options["model"]), prompts, found)
        out[name]["examples"] = [policy.tokenizer.decode(one["ids"]) for one in found[:3]]
    return out


def start(at: At[Sizes]) -> dict[str, dict[str, Any]]:
    """The untrained model's held-out answers, kept for all."""
    return at.kept("start", lambda: measured(opened(at.options["model"]), at))


class Watch(TrainerCallback):
    """Keeps what is logged of every step, and measures the policy at the end, before its adapter is merged.

    On a CPU attention is written out, as in `opened`.
    """

    def __init__(self, at: At[Sizes]) -> None:
        self.at, self.log = at, {name: [] for name in LOGGED}
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
            self.found = measured(LoadedModel(model.get_base_model(), tokenizer, "the policy"), self.at)


def run(at: At[Sizes], condition: str, seed: int) -> dict[str, Any]:
    """Train one condition and measure it: what each step logged, and the held-out answers."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    tell_cost(at.options["model"], at.sizes, len(at.levels["condition"]) * len(at.levels["seed"]))
    looping = survey(at)["looping"]
    start(at)
    rows = [{"prompt": text} for text, share in zip(prompts_of(at)["training"], looping, strict=True) if share]
    watch = Watch(at)
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
            temperature=TEMPERATURE,
            lora=RANK,
            dtype="bfloat16",
            seed=seed,
        )
        recipe = None if condition == "vanilla" else load_recipe(at.folder / "recipe.json")
        run_rl(training, rows, recipe=recipe, callbacks=[watch])
    return {"log": watch.log, **watch.found}


@cache
def tell_cost(model: Path, sizes: Sizes, cells: int) -> None:
    """What the run will take, on standard error, before the first cell."""
    weights = sum(one.numel() for one in opened(model).model.parameters())
    rows, length = GROUP * PROMPTS, OPENING + sizes.tokens
    operations = 2 * weights * (sizes.steps * rows * (sizes.tokens + 2 * length) + 3 * sizes.openings * length)
    minutes = operations / RATE / 60
    print(
        f"about {minutes:.0f} minutes a training at {RATE / 1e9:.0f} GFLOP/s, {cells} trainings, and as much as two"
        " for the features",
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
    before, known = start(at), survey(at)
    conditions = [name for name in RL_METHODS if any(row["condition"] == name for row in rows)]
    falls = {name: falls_of(before, rows, name) for name in conditions}
    parts = [*(paragraph(text) for text in verdict(falls, rows)), paragraph(setup(at, known))]
    columns = ("trained", *(f"looping, {mode}" for mode in MODES), "per seed, sampled", "fallen by, sampled",
               "fallen by, greedy", "ended", "perplexity, times", "repeated trigrams")  # fmt: skip
    table_rows = [line("no", before, [{"condition": "no", **before}], {})]
    table_rows += [line(name, before, rows, falls[name]) for name in conditions]
    return "\n\n".join([*parts, table(columns, table_rows), paragraph(learnt(rows, conditions))])


def falls_of(before: Mapping[str, Any], rows: Sequence[Row], name: str) -> dict[str, np.ndarray]:
    """`(seeds, prompts)` of each mode: loops before the training less loops after it."""
    return {mode: np.array(before[mode]["loops"], float) - figure(rows, name, "loops", mode) for mode in MODES}


def line(name: str, before: Mapping[str, Any], rows: Sequence[Row], fall: Mapping[str, np.ndarray]) -> list[str]:
    """A row of the table: one condition."""
    loops = figure(rows, name, "loops")
    quality = [
        {"quality": np.array(one["quality"], float)}
        for one in (before["sampled"], *(row["sampled"] for row in rows if row["condition"] == name))
    ]
    after = {"quality": sum(one["quality"] for one in quality[1:])}
    return [
        name,
        *(f"{across(figure(rows, name, 'loops', mode)):.1%}" for mode in MODES),
        ", ".join(f"{value:.1%}" for value in loops.mean(1)),
        *(f"{across(fall[mode]):+.1%}" if mode in fall else "" for mode in MODES),
        f"{figure(rows, name, 'finished').mean():.1%}",
        f"{dearer(after, quality[0]):.2f}" if fall else "",
        f"{figure(rows, name, 'repeated').mean():.1%}",
    ]


def setup(at: At[Sizes], known: Mapping[str, Any]) -> str:
    """Settings, and what was found before training."""
    looping, effect, sizes = np.array(known["looping"]), known["effect"], at.sizes
    held = len(prompts_of(at)["held out"])
    return f"""`python -m experiments.real.unlooping --model FOLDER --sae FOLDER --data FOLDER --write`:
        {Path(at.options["model"]).name}; openings of {OPENING} English tokens, answers of at most {sizes.tokens}
        tokens, T = {TEMPERATURE:g}. Of {len(looping)} prompts of the training half {int((looping > 0).sum())} have a
        loop among {SAMPLES} answers of the untrained model ({looping.mean():.1%} of all answers loop); they are trained
        on. GRPO: {sizes.steps} steps of {PROMPTS} prompts times {GROUP} answers, LoRA of rank {RANK}, lr {LR:g},
        bfloat16. Reward: 1 for an answer that does not loop, else 0; it knows of loops, unlike the report's, where an
        answer that loops fails because it never ends. So a group without a loop teaches nothing here, and steering is
        to give it one. Features: {", ".join(known["features"])}, each by {effect["amount"]:g} median residual norms,
        the first amount tried under which half of the answers loop, or else that with most; amplified on the rest of
        the half, looping goes from {effect["normal"]["estimate"]:.1%} to {effect["amplified"]["estimate"]:.1%}.
        Measured on all {held} held-out prompts with the same draws before and after, one answer each; intervals over
        seeds and prompts, of perplexity over prompts. Steps and learning rate were tried with another seed on other
        documents."""


def verdict(falls: Mapping[str, Mapping[str, np.ndarray]], rows: Sequence[Row]) -> list[str]:
    """Whether the report's finding holds here, and the reason as far as the log says it."""
    if len(falls) < len(RL_METHODS):
        return []
    own, ordinary, other = (falls[name]["sampled"] for name in ("steered", "vanilla", "random"))
    gap, beyond = across(own - ordinary), across(own - other)
    shown = gap.low > 0 and own.mean() >= TIMES * ordinary.mean()
    words = f"""This {"shows" if shown else "does not show"} what the report shows, that steered rollouts lower looping
        much more than ordinary ones: the share of held-out answers that loop falls by {across(own):.1%} with steered
        rollouts and by {across(ordinary):.1%} with ordinary ones, {gap:+.1%} more (wanted: at least {TIMES:g} times as
        far, and the interval above zero), and with steered ones {beyond:+.1%} more than with random features."""
    mixed = {name: 1 - logged(rows, name, "frac_reward_zero_std").mean() for name in falls}
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
    for name in conditions:
        kinds = ["ordinary"] if name == "vanilla" else ["ordinary", "steered"]
        for kind in kinds:
            values = logged(rows, name, f"{kind}/reward")
            third = max(1, values.shape[1] // 3)
            word = "with random features" if (name, kind) == ("random", "steered") else kind
            said.append(f"{name}, {word} samples: {values[:, :third].mean():.2f} to {values[:, -third:].mean():.2f}")
    entropy = ", ".join(
        f"{name} {values[:, 0].mean():.2f} to {values[:, -1].mean():.2f}"
        for name in conditions
        if (values := logged(rows, name, "entropy")).size
    )
    more = f" Entropy per token from the first step to the last, in nats: {entropy}." if entropy else ""
    return f"Mean reward over the first third of the steps to that over the last: {'; '.join(said)}.{more}"


experiment = Experiment(
    title=TITLE,
    varies={"seed": SEEDS, "condition": RL_METHODS},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"seed": (TRIED_ON,)},
    quick_sizes=Sizes(openings=24, tokens=48, steps=1),
    options={
        "model": {"type": Path, "required": True, "help": "the folder of the model"},
        "sae": {"type": Path, "required": True, "help": "the folder of its SAEs"},
        "data": {"type": Path, "required": True, "help": "the folder with corpus/"},
        "draw": {"type": int, "default": 2, "help": f"which documents (default: 2; settings were tried on {TRIED_ON})"},
    },
)

if __name__ == "__main__":
    main(experiment)
