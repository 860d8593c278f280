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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig

from qwen_scope.errors import InputError, check_count, check_number, check_share
from qwen_scope.features import matched_random
from qwen_scope.files import read_object
from qwen_scope.model import LoadedModel, load_model
from qwen_scope.scope import model_source, resolve, saes_on
from qwen_scope.steer import Recipe, calibrate

from .checkpoints import last_checkpoint, run_id
from .loops import Detector, LoopShare, Sampling, loop_share
from .prepare import versions
from .rewards import NEEDS, reward_of
from .rollouts import FiniteWeights, SteeredRollouts, SteeredTrainer
from .runs import JsonlLog, adapters, check_numbers, save_model, trained_model, trl_settings, write_json, writing_to

RL_METHODS = ("vanilla", "steered", "random")
Row = dict[str, Any]
"""A prompt as the model reads it (or its messages) in `prompt`, and the columns that the reward asks for."""


@dataclass(frozen=True)
class RLRun:
    """What a run of reinforcement learning is told.

    Attributes:
        model: `lab`, or folder or Hub id of the language model to start from.
        out: the folder of the run.
        method: `vanilla` (DAPO's loss without dynamic sampling), `steered` (one sample of each group under the
            recipe), or `random` (one sample of each group under other features that fire about as often, with changes
            of the same length).
        reward: `lab`, `answer`, `language` or `module:function`; see `reward_of`.
        sae: the SAEs of the recipe; None where the catalog knows those of the model.
        unchecked: take a recipe although the causal check did not hold or was not made.
        group: answers per prompt, the steered one among them.
        prompts: per step.
        micro: answers per forward pass.
        steps: of the optimiser.
        updates: of the optimiser per answer (mu); more than one makes the old probabilities matter.
        lr, warmup, epsilon_low, epsilon_high: of the optimiser and the clipping. The learning rate is constant after
            warming up.
        max_new_tokens, temperature, top_p: of the rollouts, and of the held-out answers.
        detector: what counts as a loop in the held-out answers; nothing in the training asks for it.
        lora, checkpointing, bf16, dtype, device, save_every, resume, seed: as in `SFTRun`.

    Raises:
        InputError: a value that can't be.
    """

    model: str
    out: Path
    method: str = "steered"
    reward: str = "answer"
    sae: str | None = None
    unchecked: bool = False
    group: int = 8
    prompts: int = 8
    micro: int = 8
    steps: int = 200
    updates: int = 1
    lr: float = 1e-6
    warmup: int = 0
    epsilon_low: float = 0.2
    epsilon_high: float = 0.28
    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    detector: Detector = field(default_factory=Detector)
    lora: int | None = None
    checkpointing: bool = False
    bf16: bool = False
    dtype: str = "float32"
    device: str | None = None
    save_every: int = 0
    resume: bool = False
    seed: int = 42
    report_to: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.method not in RL_METHODS:
            raise InputError(f"the method is one of {', '.join(RL_METHODS)}, not {self.method!r}")
        if self.group < 2:
            raise InputError(f"a group has at least two answers to compare, not {self.group}")
        counts = {"group": 2, "prompts": 1, "micro": 1, "steps": 1, "updates": 1, "max_new_tokens": 1}
        check_numbers(self, counts | {"warmup": 0, "save_every": 0, "seed": 0}, ("lr", "temperature"))
        for name in ("epsilon_low", "epsilon_high"):
            check_number(name, getattr(self, name), 0)
        check_share("top_p", self.top_p)
        if self.prompts * self.group % self.micro:
            raise InputError(
                f"{self.prompts} prompts times {self.group} answers are {self.prompts * self.group}, which forward"
                f" passes of {self.micro} don't divide"
            )
        if self.resume and not self.save_every:
            raise InputError("going on needs checkpoints: set save_every (--save-every) in both runs")
        if self.save_every % self.updates:
            raise InputError(
                f"a checkpoint falls between the {self.updates} updates that share their answers, which it does not"
                f" hold; save_every is a multiple of updates, not {self.save_every}"
            )

    @property
    def sampling(self) -> Sampling:
        """How held-out answers are sampled."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_p, self.detector, self.seed)


def run_rl(
    run: RLRun,
    rows: Sequence[Row],
    held_out: Sequence[str] = (),
    recipe: Recipe | None = None,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
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
    if len(rows) < run.prompts:
        raise InputError(f"a step takes {run.prompts} prompts, and there are {len(rows)}")
    if missing := [name for name in NEEDS.get(run.reward, ()) if name not in rows[0]]:
        raise InputError(f"the reward {run.reward!r} needs a column {missing[0]!r} beside the prompts")
    with writing_to(run.out):
        return _run(run, rows, held_out, recipe, callbacks, progress, unused or {})


def _run(
    run: RLRun,
    rows: Sequence[Row],
    held_out: Sequence[str],
    recipe: Recipe | None,
    callbacks: Sequence[TrainerCallback],
    progress: Callable[[int, int, dict[str, float]], None] | None,
    unused: Mapping[str, int],
) -> dict[str, Any]:
    """Everything that can be refused comes before the first file."""
    loaded = load_model(model_source(run.model), device=run.device, dtype=run.dtype)
    rollouts = rollouts_of(run, loaded, recipe)
    resume = last_checkpoint(run.out) if run.resume else None
    before = start_share(run, loaded, held_out, resume is not None)
    loaded.model.requires_grad_(run.lora is None)
    trainer = trainer_of(run, loaded, rows, rollouts, [JsonlLog(run.out / "log.jsonl", progress), *callbacks])
    trainer.run_id = run_id(run.out) if resume else uuid4().hex
    if trainer.is_world_process_zero():
        facts = {**asdict(run), "rows": len(rows), "held_out": len(held_out), "versions": versions()}
        facts |= {"id": trainer.run_id, "before": before, "unused": dict(unused)}
        steered_with = [one.to_json() for one in rollouts.interventions] if rollouts else []
        write_json(run.out / "run.json", facts | {"interventions": steered_with})
    with expected_warnings():
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
            reward_of(run.reward, [one for one in ends if isinstance(one, int)]),
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


def last_rewards(history: Sequence[dict[str, float]], n: int = 10) -> dict[str, float]:
    """The mean rewards over the last `n` steps that were logged."""
    check_count("n", n)
    out = {}
    for name in ("reward", "ordinary/reward", "steered/reward"):
        if found := [line[name] for line in history if name in line][-n:]:
            out[name.replace("/", "_")] = float(np.mean(found))
    return out
