"""What a run of training and one of measuring are told; light enough for `--help`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_scope.errors import InputError, NotFoundError, check_count, check_name
from qwen_scope.text import CorpusOptions

from .config import TrainConfig

if TYPE_CHECKING:
    from qwen_scope.text import Counted

    from .parallel import Mode

RUN = "run.json"
SCRATCH_FOLDER = "scratch"
RESERVED = ("checkpoints", SCRATCH_FOLDER, "tensorboard", RUN, "metrics.jsonl", "quality.json")
"""What a run writes into its folder beside the group."""

RUN_COUNTS = {"context_length": 2, "batch_size": 1, "budget": 1, "checkpoint_every": 1, "keep": 1, "log_every": 1}
RUN_COUNTS |= {"eval_tokens": 0, "hold_out": 0}
"""What is counted in a run, and the least it may be."""

EVAL_TOKENS = 65536
"""What a long run is measured on where nobody says."""


@dataclass(frozen=True)
class TrainRun:
    """What a training run is told besides the dictionary itself.

    Attributes:
        data: where the text is, as `Corpus` takes it, or several such places, which are mixed in proportion.
        out: the folder of the run.
        train: the dictionary and how it is trained.
        model: `lab`, or folder or Hub id of the language model.
        layers: layers to train on, counting from 0; None means those of `start_from`, or all.
        group: the name of the set and of its folder in `out`; None means one made of the model's name, the width and k.
        start_from: a group, folder or Hub id of SAEs to continue from, of this model or another checkpoint of it.
        against_scratch: train beside each SAE that is continued one from scratch on the same batches, and compare.
        corpus: how the documents are read; with `chat` they are rendered with the model's chat template.
        shuffle: read documents in an order drawn by the seed, sources mixed in proportion (`text.shuffle`), and not as
            they stand; which are held out does not depend on it.
        counted: which tokens count, in training and in measuring. None leaves out the first token of each row, special
            tokens, and sinks by thresholds that are measured on the text at the start; `Counted.everything()` trains on
            all.
        context_length: tokens per row of packed text.
        batch_size: rows per forward pass.
        budget: bytes of residuals that are held and shuffled.
        store: how residuals are held, `float32` or `bfloat16`.
        dtype, device: of the language model; the SAEs are trained in fp32 on the same device.
        parallel: what `torchrun` divides among processes: `data`, `layers` or `features`; `alone` for one process.
        checkpoint_every, keep: steps between checkpoints, and how many stay.
        resume: go on from the latest checkpoint in `out`.
        log_every: steps between two lines of metrics.
        tensorboard: also write TensorBoard scalars.   wandb: also log to this W&B project.
        eval_tokens: measure on about this many tokens of held-out documents; 0 leaves the measurement out. None means
            `EVAL_TOKENS`, or a tenth of the tokens of training where that is less: the model reads a token several
            times to measure on it, and measuring a short run would take longer than the run.
        hold_out: every `hold_out`-th document is kept out of training, to measure on; 0 keeps none.
        exports: further layouts to write, such as `sae_lens` and `sparsify`.

    Raises:
        InputError: a value that can't be.   NotFoundError: an unknown layout.
    """

    data: str | tuple[str, ...]
    out: Path
    train: TrainConfig
    model: str = "lab"
    layers: tuple[int, ...] | None = None
    group: str | None = None
    start_from: str | None = None
    against_scratch: bool = False
    corpus: CorpusOptions = field(default_factory=CorpusOptions)
    shuffle: bool = True
    counted: Counted | None = None
    context_length: int = 256
    batch_size: int = 16
    budget: int = 10**9
    store: str = "float32"
    dtype: str = "auto"
    device: str | None = None
    parallel: Mode = "alone"
    checkpoint_every: int = 1000
    keep: int = 2
    resume: bool = False
    log_every: int = 10
    tensorboard: bool = False
    wandb: str | None = None
    eval_tokens: int | None = None
    hold_out: int = 100
    exports: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        from qwen_scope.sae import LAYOUTS

        check_name("the group", self.name)
        if self.name in (*RESERVED, *self.exports):
            raise InputError(f"the run itself writes to {self.name!r} in its folder; name the group otherwise")
        for name, least in RUN_COUNTS.items():
            if (value := getattr(self, name)) is not None:
                check_count(name, value, least)
        if self.store not in ("float32", "bfloat16"):
            raise InputError(f"residuals are held as float32 or bfloat16, not {self.store!r}")
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise InputError(f"name each layer once, and at least one; got {list(self.layers)}")
        if unknown := [name for name in self.exports if name not in LAYOUTS]:
            raise NotFoundError(f"no layout {unknown[0]!r}; there are {', '.join(LAYOUTS)}")
        if self.measured_on and not self.hold_out:
            raise InputError("measuring needs held-out documents; set hold_out, or eval_tokens to 0")
        if self.against_scratch and not (self.start_from and self.measured_on):
            raise InputError("against_scratch compares SAEs that start_from names, and needs eval_tokens to measure on")

    @property
    def config(self) -> TrainConfig:
        """How the SAEs are trained: with the defaults of continuing where they are continued."""
        return self.train.continuing() if self.start_from else self.train

    @property
    def measured_on(self) -> int:
        """About how many held-out tokens the SAEs are measured on; 0 for none."""
        return max(1, min(EVAL_TOKENS, self.train.tokens // 10)) if self.eval_tokens is None else self.eval_tokens

    @property
    def name(self) -> str:
        """The name of the group."""
        width = f"{self.train.d_sae // 1024}K" if self.train.d_sae % 1024 == 0 else str(self.train.d_sae)
        return self.group or f"SAE-Res-{Path(self.model).name}-W{width}-L0_{self.train.k}"


def named(data: str | tuple[str, ...]) -> str:
    """Where the text is, in a sentence."""
    return data if isinstance(data, str) else ", ".join(data)


@dataclass(frozen=True)
class EvalRun:
    """What an evaluation is told.

    Attributes:
        data: where the text is, as `Corpus` takes it, or several such places. Of the text that the SAEs were trained
            on, as their files tell, the documents that were kept out of training are read, as the run that made them
            read them.
        model: `lab`, or folder or Hub id of the language model. None, with `post`, where the model that the SAEs were
            trained on is not at hand: then `post` is measured alone.
        sae: group, folder or Hub id of the SAEs; None where the catalog knows those of the model.
        hold_out: read every `hold_out`-th document, those that training with this `hold_out` does not see; 0 reads all;
            None decides as `data` says.
        post: another checkpoint of the same model: whether the SAEs fit it, too; needs `loss`.
        remember: keep that verdict in the user's state folder, so that whatever opens the pair shows it.
        layers: None means all that the group has.
        tokens: about how many to measure on; None means as many as the run measured on, or `EVAL_TOKENS`.
        corpus: how the documents are read; without `chat` as the run rendered them, or not at all.
        context_length: tokens per row; None means that of the run, or 256.
        batch_size: rows per forward pass; None means that of the run, or 16.
        loss: measure what the model's predictions lose, too.
        counted: which tokens count. None means those that the SAEs' files say; where these say none, all but the first
            token of each row, special tokens, and sinks by thresholds measured on the first rows.
        dtype, device: of the language models.
        parallel: `data` for the processes that `torchrun` started: each reads its share of the batches.
        seed: of the resampling of intervals.

    Raises:
        InputError: a value that can't be.
    """

    data: str | tuple[str, ...]
    model: str | None = "lab"
    sae: str | None = None
    post: str | None = None
    remember: bool = True
    layers: tuple[int, ...] | None = None
    hold_out: int | None = None
    tokens: int | None = None
    corpus: CorpusOptions = field(default_factory=CorpusOptions)
    context_length: int | None = None
    batch_size: int | None = None
    loss: bool = True
    counted: Counted | None = None
    dtype: str = "auto"
    device: str | None = None
    parallel: Mode = "alone"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.parallel not in ("alone", "data"):
            raise InputError(f"measuring in parallel divides data, not {self.parallel!r}")
        if self.model is None and (self.post is None or self.sae is None):
            raise InputError("without model there have to be sae and post: which SAEs, and on which checkpoint")
        for name, least in {"tokens": 2, "context_length": 2, "batch_size": 1, "hold_out": 0, "seed": 0}.items():
            if (value := getattr(self, name)) is not None:
                check_count(name, value, least)
