"""What the commands of post-training read; light enough for `--help`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from qwen_scope.errors import InputError
from qwen_scope.text import CorpusOptions

from .sampling import Sampling

COMPLETIONS = CorpusOptions(column="completion")
COMPLETION_LINES = CorpusOptions(column="completion", unit="line")
PROMPTS = CorpusOptions(column="prompt", unit="line")


@dataclass(frozen=True)
class SFTData:
    """What `sft` reads.

    Attributes:
        source: rows to learn from: whatever `Corpus` reads, or `lab`.
        table: the alpha table that `prepare` has written; the method `plain` needs none.
        held_out: rows to report the loss on.
        prompt_column: the prompt, where completions are learnt.
        group_column: the name of a row's group, such as its language.
        reading: how rows are read; its `seed` draws them, and the held-out ones by the next.
        monitor: texts to watch features on: a text per line, rows with a text, or `lab`.
        monitor_prompts: also watch them in answers to these: rows with a prompt, or `lab`.
    """

    source: str
    table: Path | None = None
    held_out: str | None = None
    prompt_column: str = "prompt"
    group_column: str = "group"
    reading: CorpusOptions = field(default_factory=lambda: COMPLETIONS)
    monitor: str | None = None
    monitor_prompts: str | None = None


@dataclass(frozen=True)
class RLData:
    """What `rl` reads.

    Attributes:
        source: rows with a prompt: whatever `Corpus` reads, or `lab`.
        recipe: what `repetition` has written; the method `vanilla` needs none.
        held_out: prompts to measure loops on.
        n: at most this many prompts.
        held_out_n: at most this many of the held-out ones.
        answer_column: the right answer, for that reward.
        reading: how rows are read; its `seed` draws them, and the held-out ones by the next.
    """

    source: str
    recipe: Path | None = None
    held_out: str | None = None
    n: int = 1000
    held_out_n: int = 200
    answer_column: str = "answer"
    reading: CorpusOptions = field(default_factory=lambda: PROMPTS)


@dataclass(frozen=True)
class PrepareRun:
    """What `prepare_table` is told: see `prepare`.

    Attributes:
        source: rows with a text and its group: whatever `Corpus` reads, or `lab`.
        target: the group whose features are wanted.
        layers: None means the last two that have an SAE.
        features: how many of each layer.
        onsets: rows to learn from, or `lab`: features are ranked by their effect on what begins `script` in answers.
        script: the target's script, such as `CJK`, `HANGUL` or `CYRILLIC`: what `onsets` begin with, and a penalty on
            tokens is then on all of the script's.
        quantile: alpha is this quantile of the pre-activations, not their mean.
        at_random: a seed that draws other features in place of the best: the control.
        group_column: the name of a row's group.
        reading: how rows are read; its `seed` draws them.

    Raises:
        InputError: `onsets` without `script`.
    """

    source: str
    target: str
    layers: tuple[int, ...] | None = None
    features: int = 2
    onsets: str | None = None
    script: str | None = None
    quantile: float | None = None
    at_random: int | None = None
    group_column: str = "group"
    reading: CorpusOptions = field(default_factory=CorpusOptions)

    def __post_init__(self) -> None:
        if self.onsets is not None and self.script is None:
            raise InputError("ranking by effect needs script= with what begins in the rows of onsets=")


@dataclass(frozen=True)
class ModelEvalRun:
    """What `evaluate_model` is told.

    Attributes:
        prompts: prompts to answer: a `.txt` file with one per line, rows with a prompt, or `lab`.
        script: the script that answers should not hold, such as `CJK`, `HANGUL` or `CYRILLIC`.
        groups: only prompts of these groups; in the lab languages.
        held_out: rows to report the loss on.
        model: `lab`, or folder or Hub id of the language model.
        samples: answers per prompt.
        temperature, top_p, max_new_tokens: of the answers.
        prompt_column, group_column: where rows have their prompt and the name of their group.
        n: at most this many prompts, and rows to report on.
        reading: how rows are read; its `seed` draws the prompts. The held-out rows are the same whatever it is.
        seed: of the answers.
        device, dtype: of the model.

    Raises:
        InputError: prompts without a script or a script without prompts, or nothing to measure.
    """

    prompts: str | None = None
    script: str | None = None
    groups: tuple[str, ...] | None = None
    held_out: str | None = None
    model: str = "lab"
    samples: int = 8
    temperature: float = 1.0
    top_p: float = 0.8
    max_new_tokens: int = 2048
    prompt_column: str = "prompt"
    group_column: str = "group"
    n: int | None = None
    reading: CorpusOptions = field(default_factory=lambda: COMPLETION_LINES)
    seed: int = 0
    device: str | None = None
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if (self.prompts is None) != (self.script is None):
            raise InputError("the code-switch ratio needs both: prompts, and script= with what answers should not hold")
        if self.prompts is None and self.held_out is None:
            raise InputError("nothing to measure: give prompts and script=, or held_out=, or both")


@dataclass(frozen=True)
class RepetitionRun:
    """What `find_repetition` is told: see `repetition_recipe`.

    Attributes:
        source: rows with a prompt: whatever `Corpus` reads, or `lab`.
        layers: to choose among; None for all that have an SAE.
        features: how many in all.
        amount: of each, in median residual norms; None takes the smallest that makes half of the answers loop.
        samples: answers per prompt to look for loops in.
        looping: texts that end in a loop, beside the model's own: whatever `Corpus` reads.
        n: at most this many prompts.
        reading: how rows are read.
        sampling: how answers are sampled, and what counts as a loop.
    """

    source: str
    layers: tuple[int, ...] | None = None
    features: int = 8
    amount: float | None = None
    samples: int = 1
    looping: str | None = None
    n: int = 200
    reading: CorpusOptions = field(default_factory=lambda: PROMPTS)
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class TargetOptions:
    """Which features `synthesize` writes texts for; exactly one of the first three says it.

    Attributes:
        features: a list of names such as `2/3,2/40-50`.
        search: words that their label or note has.
        concept: what the judge finds them relevant to.
        tau: how relevant, from 0 to 1.
        strength: they fire above this share of their own activations in the store; 0: at all.
        layer: of `features` named without one; None means the only one of the store.

    Raises:
        InputError: none of the three, or more than one.
    """

    features: str | None = None
    search: str | None = None
    concept: str | None = None
    tau: float = 0.5
    strength: float = 0.0
    layer: int | None = None

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.features, self.search, self.concept)) != 1:
            raise InputError("say which targets: one of features=, search= or concept=")


@dataclass(frozen=True)
class WriterOptions:
    """Who writes for `synthesize`, within what limits.

    Attributes:
        writer: the model to ask, or `lab`, which knows the lab's grammar; None takes OPENAI_MODEL.
        max_tokens: the budget of tokens; None for no limit.
        concurrency: requests at a time.
        timeout: seconds for one request.
        price_in, price_out: of a million tokens of prompts and of answers; both or none.

    Raises:
        InputError: one price without the other.
    """

    writer: str | None = None
    max_tokens: int | None = None
    concurrency: int = 8
    timeout: float = 120.0
    price_in: float | None = None
    price_out: float | None = None

    def __post_init__(self) -> None:
        if (self.price_in is None) != (self.price_out is None):
            raise InputError("a price needs both: price_in= and price_out=, per million tokens")

    @property
    def per_million(self) -> tuple[float, float] | None:
        """Both prices."""
        return None if self.price_in is None or self.price_out is None else (self.price_in, self.price_out)
