"""A whole run of reinforcement learning with steered rollouts, or one of its controls; TRL trains.

```
out/
  run.json       the resolved settings, what was steered with, versions and seed
  log.jsonl      what the trainer logged, one line per step
  metrics.json   looping share of held-out prompts before and after, rewards
  checkpoints/   TRL's own, for --resume
  model/         the result, loadable like any model (a LoRA adapter is merged; it lies beside, in adapter/)
```
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any
from uuid import uuid4

import numpy as np
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig

from qwen_scope.errors import InputError, check_count
from qwen_scope.features import matched_random
from qwen_scope.files import read_object
from qwen_scope.model import LoadedModel, load_model, packed_head
from qwen_scope.report import Progress
from qwen_scope.scope import model_source, resolve, saes_on
from qwen_scope.steer import Recipe, calibrate, load_recipe

from .checkpoints import last_checkpoint, run_id
from .data import RLData
from .loops import LoopShare, loop_share
from .options import RLRun
from .prepare import versions
from .rewards import NEEDS, reward_of
from .rollouts import FiniteWeights, SteeredRollouts, SteeredTrainer
from .runs import JsonlLog, adapters, save_model, trained_model, trl_settings, write_json, writing_to
from .samples import Row
from .sources import check_run, read_rows


def rl(run: RLRun, data: RLData, *, progress: Progress | None = None) -> dict[str, Any]:
    """Read the prompts and train on them; returns what `metrics.json` holds.

    Args:
        progress: called with the stage, its share done (0 to 1) and a short text.

    Raises:
        QwenScopeError: with one sentence, before training where the cause can be known before.
    """
    check_run(run.out, run.model, run.sae, data.source, data.held_out, data.recipe)
    run = run if run.reward is not None else replace(run, reward="lab" if data.source == "lab" else "answer")
    answer, unused = data.answer_column if run.reward == "answer" else None, Counter[str]()
    rows = read_rows(data.source, data.reading, answer, data.n, run.model, unused=unused)
    later = replace(data.reading, sample=None, seed=data.reading.seed + 1)
    asked = read_rows(data.held_out, later, None, data.held_out_n, run.model, held_out=True) if data.held_out else []
    recipe = None if data.recipe is None else load_recipe(data.recipe)
    prompts = [row["prompt"] for row in asked]
    return run_rl(run, rows, prompts, recipe, unused=unused, progress=progress)


def run_rl(
    run: RLRun,
    rows: Sequence[Row],
    held_out: Sequence[str] = (),
    recipe: Recipe | None = None,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Progress | None = None,
    unused: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Train and save; returns what `metrics.json` holds.

    Args:
        rows: prompts to learn on, with what the reward asks for.
        held_out: prompts whose looping share is measured before and after.
        recipe: of the features to steer with, from `repetition_recipe`; the method `vanilla` needs none.
        callbacks, progress, unused: as in `run_sft`.

    Raises:
        QwenScopeError: with one sentence, before training where the cause can be known before.
    """
    if not rows:
        raise InputError("there is no prompt to learn on")
    run = run if run.reward is not None else replace(run, reward="answer")
    if len(rows) < run.prompts:
        raise InputError(f"a step takes {run.prompts} prompts, and there are {len(rows)}")
    if missing := [name for name in NEEDS.get(str(run.reward), ()) if name not in rows[0]]:
        raise InputError(f"the reward {run.reward!r} needs a column {missing[0]!r} beside the prompts")
    with writing_to(run.out):
        return _run(run, rows, held_out, recipe, callbacks, progress, unused or {})


def _run(
    run: RLRun,
    rows: Sequence[Row],
    held_out: Sequence[str],
    recipe: Recipe | None,
    callbacks: Sequence[TrainerCallback],
    progress: Progress | None,
    unused: Mapping[str, int],
) -> dict[str, Any]:
    """Everything that can be refused comes before the first file."""
    loaded = load_model(model_source(run.model), device=run.device, dtype=run.dtype)
    rollouts = rollouts_of(run, loaded, recipe)
    resume = last_checkpoint(run.out) if run.resume else None
    before = start_share(run, loaded, held_out, resume is not None)
    loaded.model.requires_grad_(run.lora is None)
    trainer = trainer_of(run, loaded, rows, rollouts, [JsonlLog(run.out / "log.jsonl", progress, rewards), *callbacks])
    trainer.run_id = run_id(run.out) if resume else uuid4().hex
    if trainer.is_world_process_zero():
        facts = {**asdict(run), "rows": len(rows), "held_out": len(held_out), "versions": versions()}
        facts |= {"id": trainer.run_id, "before": before, "unused": dict(unused)}
        steered_with = [one.to_json() for one in rollouts.interventions] if rollouts else []
        write_json(run.out / "run.json", facts | {"interventions": steered_with})
    with expected_warnings(), packed_head(loaded.model):
        done = trainer.train(resume_from_checkpoint=resume)
    metrics: dict[str, Any] = {"steps": done.global_step, **last_rewards(trainer.state.log_history)}
    policy = trained_model(trainer, run.out).eval()
    after = share_of(loop_share(policy, loaded.tokenizer, held_out, run.sampling)) if held_out else None
    for name, found in (("before", before), ("after", after)):
        if found is not None:
            metrics |= {f"{figure}_{name}": value for figure, value in found.items()}
    if trainer.is_world_process_zero():
        save_model(policy, loaded, run.out)
        write_json(run.out / "metrics.json", metrics)
    return metrics


def start_share(run: RLRun, loaded: LoadedModel, held_out: Sequence[str], resumed: bool) -> dict[str, Any] | None:
    """How often the start model's held-out answers loop; a run that goes on takes it from its `run.json`."""
    if not held_out:
        return None
    known = read_object(run.out / "run.json") if resumed and (run.out / "run.json").is_file() else {}
    if known.get("before") is not None and known.get("held_out") == len(held_out):
        return known["before"]
    return share_of(loop_share(loaded.model, loaded.tokenizer, held_out, run.sampling))


def share_of(found: LoopShare) -> dict[str, Any]:
    """The figures of answers that may loop, as plain data."""
    return {"loop_share": asdict(found.share), "finished": found.finished}


def rollouts_of(run: RLRun, loaded: LoadedModel, recipe: Recipe | None) -> SteeredRollouts | None:
    """What one sample of each group is generated under; None where it is like the others.

    Raises:
        InputError: no recipe, one of other units, or one whose causal check did not hold.
        MismatchError: a recipe of another model or other SAEs.
    """
    if run.method == "vanilla":
        return None
    if recipe is None:
        raise InputError(
            f"the method {run.method!r} needs a recipe of features; make one with qwen-scope posttrain repetition"
        )
    saes = saes_on(loaded, resolve(run.model, run.sae)[1], device=loaded.model.device)
    recipe.check(loaded.model, saes)
    if not recipe.effect.get("causal") and not run.unchecked:
        parts = {"estimate", "low", "high"}
        found = {name: x for name in ("raises", "lowers") if parts <= set(x := recipe.effect.get(name) or {})}
        figures = [
            f"{name} looping by {x['estimate']:.1%} [{x['low']:.1%}, {x['high']:.1%}]" for name, x in found.items()
        ]
        said = f"did not hold: it {' and '.join(figures)}" if figures else "was not made"
        raise InputError(
            f"the causal check of the recipe {recipe.name!r} {said}; features that don't drive repetition teach nothing"
            " about it: find others, or another amount, or train all the same with --unchecked"
        )
    interventions = list(recipe.interventions)
    if any(one.needs_stats or one.op != "add" or one.feature is None or one.where.by_phase for one in interventions):
        raise InputError("a recipe for rollouts adds features, not at phases and in raw units; resolve its amounts")
    if run.method == "random":
        layers = {one.layer for one in interventions}
        stats = {layer: calibrate(loaded.model, loaded.tokenizer, layer, saes[layer]) for layer in layers}
        interventions = matched_random(interventions, saes, stats, np.random.default_rng(run.seed))
    return SteeredRollouts(interventions, saes)


def trainer_of(
    run: RLRun,
    loaded: LoadedModel,
    rows: Sequence[Row],
    rollouts: SteeredRollouts | None,
    callbacks: Sequence[TrainerCallback],
) -> SteeredTrainer:
    """TRL's trainer with the run's settings, reward and rollouts."""
    ends: Any = loaded.model.generation_config.eos_token_id if loaded.model.generation_config else None
    ends = [*(ends if isinstance(ends, list) else [ends]), loaded.tokenizer.eos_token_id]
    with expected_warnings():
        trainer = SteeredTrainer(
            loaded.model,
            reward_of(str(run.reward), [one for one in ends if isinstance(one, int)]),
            grpo_config(run, loaded),
            train_dataset=Dataset.from_list(list(rows)),
            processing_class=loaded.tokenizer,
            callbacks=[FiniteWeights(), *callbacks],
            peft_config=adapters(run.lora),
            rollout_func=rollouts,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


@contextmanager
def expected_warnings() -> Iterator[None]:
    """TRL says that its rollout function is experimental, and reads a name that transformers has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*'rollout_func'.*")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        yield


def grpo_config(run: RLRun, loaded: LoadedModel) -> GRPOConfig:
    """The run in TRL's words: DAPO's loss and clipping, no KL term, no dynamic sampling."""
    answers = run.prompts * run.group
    return GRPOConfig(
        **trl_settings(run, loaded),
        loss_type="dapo",
        beta=0.0,
        epsilon=run.epsilon_low,
        epsilon_high=run.epsilon_high,
        num_iterations=run.updates,
        num_generations=run.group,
        per_device_train_batch_size=run.micro,
        gradient_accumulation_steps=answers // run.micro,
        max_completion_length=run.max_new_tokens,
        temperature=run.temperature,
        top_p=run.top_p,
        lr_scheduler_type="constant_with_warmup",
        max_steps=run.steps,
        logging_steps=1,
    )


def rewards(log: Mapping[str, float]) -> str:
    """What a line of the log says while it runs."""
    return f"reward {log.get('reward', 0):.2f}"


def last_rewards(history: Sequence[dict[str, float]], n: int = 10) -> dict[str, float]:
    """The mean rewards over the last `n` steps that were logged."""
    check_count("n", n)
    out = {}
    for name in ("reward", "ordinary/reward", "steered/reward"):
        if found := [line[name] for line in history if name in line][-n:]:
            out[name.replace("/", "_")] = float(np.mean(found))
    return out
