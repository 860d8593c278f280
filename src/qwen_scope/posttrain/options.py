"""What runs of post-training are told; light enough for `--help`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_scope.errors import (
    InputError,
    NotFoundError,
    brief,
    check_count,
    check_number,
    check_positive,
    check_share,
)
from qwen_scope.text import Chat

from .sampling import Detector, Sampling

METHODS = ("plain", "features", "penalty")
RL_METHODS = ("vanilla", "steered", "random")

SCALES = ("mean", "published")
"""What lambda multiplies. `mean`: one mean over all response tokens of the optimiser step, however it is cut.
`published`: the mean over the response tokens of each forward pass, summed over the passes of a step and averaged over
processes. That is what SASFT's code adds up to with the transformers (4.51.0) that its authors pin: they normalise the
term per pass, and nothing divides it by the number of passes. With their one sample per pass and 32 passes it is about
32 times the `mean` term, so a published lambda is meant in this scale."""

WRITTEN = (
    "run.json",
    "log.jsonl",
    "metrics.json",
    "monitor.jsonl",
    "monitor_start.npz",
    "checkpoints",
    "adapter",
    "model",
)
"""What a run writes in its folder."""


@dataclass(frozen=True)
class SFTRun:
    """What a fine-tuning run is told.

    Attributes:
        model: `lab`, or folder or Hub id of the language model.
        out: the folder of the run.
        method: `plain`, `features` (SASFT), or `penalty` (on the probability of the target's own tokens).
        sae: the SAEs of the alpha table; None where the catalog knows those of the model.
        weight: lambda of the extra term.
        lambda_scale: what it multiplies: `mean`, over the whole step, or `published`, as in SASFT's code (`SCALES`).
        zero, enhance: the variants of `FeatureLoss`.
        layers: of the table; None for all.
        lr, batch, accumulate, epochs, max_steps, warmup, weight_decay, max_length, seed: as in TRL. The published runs
            take AdamW, weight decay 0.1, cosine, 100 steps of warm-up, 2,048 tokens, one epoch, one sample times 32,
            seed 42.
        lora: the rank of adapters on all linear layers; None trains every weight.
        packing, checkpointing, bf16: as in TRL.
        dtype, device: of the model while it trains.
        watch_every: steps between two measurements of the monitor; None measures as often as 2% of the time allow.
        save_every: steps between checkpoints; 0 keeps none.
        resume: go on from the last checkpoint in `out`.

    Raises:
        InputError: a value that can't be.
    """

    model: str
    out: Path
    method: str = "features"
    sae: str | None = None
    weight: float = 1e-3
    lambda_scale: str = "mean"
    zero: bool = False
    enhance: bool = False
    layers: tuple[int, ...] | None = None
    lr: float = 5e-5
    batch: int = 1
    accumulate: int = 32
    epochs: float = 1.0
    max_steps: int = -1
    warmup: int = 100
    weight_decay: float = 0.1
    max_length: int = 2048
    seed: int = 42
    lora: int | None = None
    packing: bool = False
    checkpointing: bool = False
    bf16: bool = False
    dtype: str = "float32"
    device: str | None = None
    watch_every: int | None = None
    save_every: int = 0
    resume: bool = False
    log_every: int = 10
    report_to: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"the method is one of {', '.join(METHODS)}, not {self.method!r}")
        check_scale(self.weight, self.lambda_scale)
        if self.method == "plain" and (self.zero or self.enhance or self.layers):
            raise InputError("zero, enhance and layers belong to the method 'features'")
        check_numbers(
            self,
            {
                "batch": 1,
                "accumulate": 1,
                "max_length": 1,
                "max_steps": -1,
                "warmup": 0,
                "save_every": 0,
                "seed": 0,
                "log_every": 1,
            },
            ("lr", "epochs"),
        )
        check_number("weight_decay", self.weight_decay, 0)
        if self.watch_every is not None:
            check_count("watch_every", self.watch_every)
        if self.resume and not self.save_every:
            raise InputError("resuming requires checkpoints: set save_every (--save-every) in both runs")


@dataclass(frozen=True)
class RLRun:
    """What a run of reinforcement learning is told.

    Attributes:
        model: `lab`, or folder or Hub id of the language model to start from.
        out: the folder of the run.
        method: `vanilla` (DAPO's loss without dynamic sampling), `steered` (one sample of each group under the
            recipe), or `random` (one sample of each group under other features that fire about as often, with changes
            of the same length).
        reward: `lab`, `answer`, `language` or `module:function`; see `reward_of`. None
            takes `lab` for the lab's prompts and `answer` for any other.
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
    reward: str | None = None
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
            raise InputError("resuming requires checkpoints: set save_every (--save-every) in both runs")
        if self.save_every % self.updates:
            raise InputError(
                f"a checkpoint falls between the {self.updates} updates that share their answers, which it does not"
                f" hold; save_every is a multiple of updates, not {self.save_every}"
            )

    @property
    def sampling(self) -> Sampling:
        """How held-out answers are sampled."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_p, self.detector, self.seed)


@dataclass(frozen=True)
class SynthesisOptions:
    """How a corpus is completed.

    Attributes:
        want: in how many documents each target should fire, those of the seed corpus included. 1 asks only for missing
            targets; more also for weakly covered ones, the weakest first.
        budget: answers in all, over all runs of the same command; retries of a failed request don't count.
        tries: answers asked for one target before it is given up.
        batch: targets in one round; what a round covers is not asked for again in the next.
        shown: contexts in a prompt.
        max_answer_tokens, temperature: of an answer.
        pairs: also ask for each kept text without its feature.
        instruction: the column `prompt` of the pairs.
        seed: of which contexts are shown.
        chat: render the documents of the seed corpus with the chat template, in this mode; without one a conversation
            there can't be used.

    Raises:
        InputError: a number that can't be.
    """

    want: int = 1
    budget: int = 1000
    tries: int = 8
    batch: int = 64
    shown: int = 5
    max_answer_tokens: int = 300
    temperature: float = 1.0
    pairs: bool = False
    instruction: str = "Write a short text."
    seed: int = 0
    chat: Chat | None = None

    def __post_init__(self) -> None:
        for name in ("want", "budget", "tries", "batch", "shown", "max_answer_tokens"):
            check_count(name, getattr(self, name))
        check_count("seed", self.seed, 0)
        check_number("temperature", self.temperature, 0, 2)


def check_numbers(run: Any, counts: Mapping[str, int], positive: Sequence[str]) -> None:
    """Refuse numbers of a run that can't be: booleans, fractions where things are counted, NaN.

    Args:
        counts: fields that count, each with the least it may be.   positive: fields above zero.

    Raises:
        InputError: one that is not so.
    """
    for name, least in counts.items():
        check_count(name, getattr(run, name), least)
    for name in positive:
        check_positive(name, getattr(run, name))
    if run.lora is not None:
        check_count("lora", run.lora)


def check_scale(weight: float, scale: str) -> None:
    """Refuse a lambda that is no number from 0 up, and an unknown scale.

    Raises:
        InputError: the first.   NotFoundError: the second.
    """
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise InputError(f"the weight of an extra term must be a finite number of at least 0; got {brief(weight)}")
    if scale not in SCALES:
        raise NotFoundError(f"lambda has no scale {scale!r}; it is one of {', '.join(SCALES)}")
