"""Groups of rollouts in which one answer is generated under steering: TRL's `GRPOTrainer` with one sample replaced.

Steering can't produce better answers than the model's own, but failures are easy to induce: the policy learns to avoid
what the steered sample does (arXiv 2605.11887, section 8.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from trl.trainer.grpo_trainer import GRPOTrainer

from qwen_scope.errors import InputError
from qwen_scope.steer import Intervention, SAEsByLayer, steering
from qwen_scope.train import DivergedError

from .checkpoints import WholeCheckpoints


class SteeredRollouts:
    """A `rollout_func`: in every group the last answer is generated under interventions, the others as TRL does it.

    Hooks stand only while the steered answers are generated. The trainer scores all of them afterwards with its
    ordinary reward and its ordinary, unsteered policy, so that the importance ratio of the steered answer starts at 1
    like everyone's. While the trainer evaluates nothing is steered.

    Args:
        interventions: what is done at every generation step, in raw units.
        saes: those of the features.

    Attributes:
        steered: the numbers of the steered answers in the batch rolled out last.
    """

    def __init__(self, interventions: Sequence[Intervention], saes: SAEsByLayer) -> None:
        self.interventions, self.saes = list(interventions), saes
        self.steered: list[int] = []

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Answers to prompts that arrive repeated, all copies of one group in a row."""
        group = trainer.num_generations
        first = trainer.accelerator.process_index * len(prompts)
        self.steered = [i for i in range(len(prompts)) if (first + i) % group == group - 1]
        if not trainer.model.training:
            self.steered = []
        check_groups(prompts, first, group if trainer.model.training else 1)
        prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
        prompt_ids = [list(ids) for ids in prompt_ids]
        plain = [i for i in range(len(prompts)) if i not in set(self.steered)]
        answers: dict[int, list[int]] = {}
        if plain:
            answers |= dict(zip(plain, answered(trainer, [prompt_ids[i] for i in plain]), strict=True))
        if self.steered:
            asked = [prompt_ids[i] for i in self.steered]
            policy = trainer.accelerator.unwrap_model(trainer.model)
            with steering(policy, self.interventions, self.saes, prompt_lengths=[len(ids) for ids in asked]):
                answers |= dict(zip(self.steered, answered(trainer, asked), strict=True))
        completions = [answers[i] for i in range(len(prompts))]
        marks = [i in set(self.steered) for i in range(len(prompts))]
        return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None, "steered": marks}


def answered(trainer: Any, prompt_ids: list[list[int]]) -> list[list[int]]:
    """TRL's own way from prompts to answers, each up to and with the token that ends it.

    Raises:
        DivergedError: the policy's probabilities are no numbers any more.
    """
    try:
        return trainer._generate_single_turn(prompt_ids, None, {}, trainer.num_generations)[0]
    except RuntimeError as error:
        if "probability tensor" in str(error):
            raise diverged(trainer.state.global_step) from error
        raise


def check_groups(prompts: Sequence[Any], first: int, group: int) -> None:
    """Refuse a batch whose groups are not where they are expected: a steered sample in each, and one only."""
    for i in range(1, len(prompts)):
        if (first + i) % group and prompts[i] != prompts[i - 1]:
            raise InputError(
                f"prompts did not arrive repeated {group} times in a row, so there is no telling which group an answer"
                " belongs to; this trainer's sampler is not TRL's"
            )


class SteeredTrainer(WholeCheckpoints, GRPOTrainer):
    """`GRPOTrainer` that says clearly when its numbers are no numbers any more, and tells both kinds of sample apart.

    It logs `steered/reward` and `ordinary/reward` beside TRL's own figures.
    """

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        marks = [bool(row.pop("steered", False)) for row in inputs]
        # `rewards` are of all processes, the marks of this one
        here = slice(len(marks) * self.accelerator.process_index, len(marks) * (self.accelerator.process_index + 1))
        own, chosen = rewards[here].nansum(1), torch.tensor(marks, device=rewards.device)
        bare: Any = self.model
        mode = "train" if bare.training else "eval"
        for name, some in (("steered", own[chosen]), ("ordinary", own[~chosen])):
            if len(some):
                self._metrics[mode][f"{name}/reward"].append(float(some.mean()))
        return rewards

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss.

        Raises:
            DivergedError: it is not finite.
        """
        loss: Tensor = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not bool(loss.detach().isfinite().all()):
            raise diverged(self.state.global_step)
        return loss


class FiniteWeights(TrainerCallback):
    """Ends a run whose weights are no numbers any more, before they are saved over good ones."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trained = [p.detach() for p in kwargs["model"].parameters() if p.requires_grad]
        if not bool(torch.nn.utils.get_total_norm(trained).isfinite()):
            raise diverged(state.global_step)


def diverged(step: int) -> DivergedError:
    """What is said about NaN."""
    return DivergedError(
        f"weights, loss or probabilities are not finite numbers at step {step}: lower the learning rate or the amount,"
        " and go on from the last checkpoint"
    )
