"""What one training run is told: every choice once, with its default and where that comes from."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from qwen_scope.errors import InputError, check_count

from .shape import RunShape

if TYPE_CHECKING:
    from .architectures import Architecture

# A window of fewer steps without firing says nothing about a feature.
DEAD_STEPS = 10

ANY = -(2**63)  # the least of a whole number whose range is checked elsewhere

AUX = 1 / 32

FREEZABLE = ("W_enc", "W_dec", "b_enc", "b_dec")

CONTINUING = 0.3  # docs/log.md, "Where training begins"

# Steps from which the published learning rate is taken as it is. A shorter run explains more at a higher one; rates
# above what this gives explained no more and left more features dead (docs/log.md, "The trainer").
LONG_RUN = 50_000


@dataclass(frozen=True)
class TrainConfig:
    """The choices of one run, shared by all its layers.

    Attributes:
        d_sae: the number of features.
        k: features active per token. BatchTopK keeps it on average over a batch; JumpReLU aims at it.
        tokens: training tokens per layer; the run has `tokens // batch` steps.
        architecture: `topk` (the released kind), `batchtopk`, `matryoshka` or `jumprelu`; or an object such as
            `JumpReLUTraining(bandwidth=0.2)`, which holds the options of its kind.
        batch: tokens per step.
        lr: peak learning rate; None means `2e-4 / sqrt(d_sae / 2**14)` (Gao et al. 2024, as sparsify uses it) for a run
            of `LONG_RUN` steps or more; a shorter one multiplies it by `sqrt(LONG_RUN / steps)`, up to ten times.
        warmup: steps of linear warm-up; None means 1,000, or a twentieth of a run shorter than 20,000 steps.
        decay: the last share of the run in which the learning rate falls linearly to zero.
        betas: Adam's two rates. A feature fires on few tokens, so most of its gradients are zeros: with Adam's own 0.9
            and 0.999 the rare other ones move it too far, and more features die. Measured on runs of 250 to 10,000
            steps (docs/log.md, "The trainer").
        eps: Adam's epsilon, small because the loss is divided by the total variance (Gao et al. 2024).
        clip: largest norm of one layer's gradient.
        aux_weight: weight of AuxK; None means 1/32 (the Qwen-Scope report).
        k_aux: dead features that AuxK may use per token; None means half of d_model (Gao et al. 2024).
        dead_tokens: a feature that fired in none of this many last tokens is dead; None means 10M or a tenth of
            the run, whichever is less. A window shorter than `DEAD_STEPS` steps never calls a feature dead.
        pre_bias: encode `x - b_dec` in training; folded into `b_enc` on export. Without it, features whose direction
            points away from the mean residual start dead and AuxK, which sees them through a ReLU, can't reach them.
        scale_input: divide residuals by a constant so that their mean squared norm is d_model; folded on export.
        seed: of the initial weights and, with the layer's name, of each layer.
        frozen: which of `FREEZABLE` stay as they were drawn, to make the controls of a scoreboard.

    Raises:
        InputError: a value that can't be, or two that exclude each other.
        NotFoundError: an architecture that does not exist.
    """

    d_sae: int
    k: int
    tokens: int
    architecture: str | Architecture = "topk"
    batch: int = 4096
    lr: float | None = None
    warmup: int | None = None
    decay: float = 0.5
    betas: tuple[float, float] = (0.5, 0.95)
    eps: float = 6.25e-10
    clip: float = 1.0
    aux_weight: float | None = None
    k_aux: int | None = None
    dead_tokens: int | None = None
    pre_bias: bool = True
    scale_input: bool = True
    seed: int = 0
    frozen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        kind = self.kind
        for name in ("d_sae", "k", "tokens", "batch", "seed", "warmup", "k_aux", "dead_tokens"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), ANY)
        check_count("seed", self.seed, 0, 2**32 - 1)
        for name in ("decay", "aux_weight", "lr", "clip", "eps"):
            if isinstance(getattr(self, name), bool):
                raise InputError(f"{name} is a number, not {getattr(self, name)}")
        for name in ("d_sae", "k", "tokens", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.k > self.d_sae:
            raise InputError(f"k is {self.k}, but the dictionary has only {self.d_sae} features")
        if self.tokens < self.batch:
            raise InputError(f"{self.tokens} tokens are fewer than one batch of {self.batch}; lower batch")
        for name in ("lr", "clip", "eps"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InputError(f"{name} must be a positive number, got {value}")
        if not 0 <= self.decay <= 1:
            raise InputError(f"decay is a share of the run, 0 to 1, got {self.decay}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas are two numbers from 0 up to but not including 1, got {self.betas}")
        if self.warmup is not None and not 0 <= self.warmup <= self.steps:
            raise InputError(f"a warm-up of {self.warmup} steps does not fit a run of {self.steps}")
        if not 0 <= self.aux < math.inf:
            raise InputError(f"aux_weight must not be negative, got {self.aux_weight}")
        if unknown := [name for name in self.frozen if name not in FREEZABLE]:
            raise InputError(f"what can be frozen is {', '.join(FREEZABLE)}, not {unknown[0]!r}")
        kind.check(self.shape)

    @property
    def kind(self) -> Architecture:
        """The architecture with its options."""
        from .architectures import architecture

        return architecture(self.architecture) if isinstance(self.architecture, str) else self.architecture

    @property
    def shape(self) -> RunShape:
        """What the architecture knows of the run."""
        return RunShape(self.d_sae, self.k, self.steps)

    def to_json(self) -> dict[str, Any]:
        """As values of JSON: the architecture by its name, its options beside the rest."""
        own = {field.name: getattr(self, field.name) for field in fields(self)} | {"aux_weight": self.aux}
        if not self.frozen:  # as runs that knew nothing of it wrote it
            del own["frozen"]
        return json.loads(json.dumps({**own, "architecture": self.kind.name, **vars(self.kind)}))

    def resolved(self) -> dict[str, Any]:
        """As `to_json`, with what is used where nothing was said."""
        return self.to_json() | {"lr": self.peak_lr, "warmup": self.warmup_steps, "dead_tokens": self.dead_window}

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return self.tokens // self.batch

    @property
    def aux(self) -> float:
        """The weight of AuxK."""
        return AUX if self.aux_weight is None else self.aux_weight

    def continuing(self) -> TrainConfig:
        """This run where it begins with finished SAEs, with other defaults: those weights are nearly right.

        Without a learning rate of its own `CONTINUING` times that of a new run. Without a weight of its own no AuxK,
        which would turn features that this text has no use for into other ones: a feature keeps its number and meaning.
        """
        lr = CONTINUING * self.peak_lr if self.lr is None else self.lr
        return replace(self, lr=lr, aux_weight=0.0 if self.aux_weight is None else self.aux_weight)

    def anew(self) -> TrainConfig:
        """A run to compare one that continues with: as many tokens, by the defaults of a run that begins anew."""
        return replace(self, lr=None, warmup=None, aux_weight=None)

    @property
    def warmup_steps(self) -> int:
        return min(1000, self.steps // 20) if self.warmup is None else self.warmup

    @property
    def peak_lr(self) -> float:
        if self.lr is not None:
            return self.lr
        short = min(10.0, max(1.0, math.sqrt(LONG_RUN / self.steps)))
        return 2e-4 / math.sqrt(self.d_sae / 2**14) * short

    def lr_at(self, step: int) -> float:
        """The learning rate of one step, counted from 0: linear warm-up, constant, linear decay to zero."""
        up = min(1.0, (step + 1) / (self.warmup_steps + 1))
        falling = self.decay * self.steps
        down = min(1.0, (self.steps - step) / (falling + 1)) if falling else 1.0
        return self.peak_lr * up * down

    @property
    def dead_window(self) -> int | None:
        """Tokens without firing after which a feature is dead, or None where a run is too short to tell."""
        window = min(10_000_000, self.tokens // 10) if self.dead_tokens is None else self.dead_tokens
        return window if self.dead_tokens is not None or window >= DEAD_STEPS * self.batch else None


SCRATCH = "scratch:"
"""Before the hook point, the name of an SAE that is trained from scratch beside one that is continued."""


@dataclass(frozen=True)
class Plan:
    """How the layers of a run are trained.

    Attributes:
        config: of the SAEs of the run.
        scratch: of others on the same batches that begin anew, to be compared with; None for none.

    Raises:
        InputError: these are of other batches.
    """

    config: TrainConfig
    scratch: TrainConfig | None = None

    def __post_init__(self) -> None:
        mine, other = self.config, self.scratch
        if other is not None and (other.tokens, other.batch) != (mine.tokens, mine.batch):
            raise InputError(
                f"SAEs from scratch are trained on the same batches: {mine.tokens} tokens in batches of {mine.batch},"
                f" not {other.tokens} in batches of {other.batch}"
            )

    def of(self, name: str) -> TrainConfig:
        """The config of a layer."""
        return self.scratch if self.scratch is not None and name.startswith(SCRATCH) else self.config

    def to_json(self) -> dict[str, Any]:
        """As values of JSON: the config, and beside it that of the others."""
        return {**self.config.to_json(), **({} if self.scratch is None else {"scratch": self.scratch.to_json()})}


def hook_of(name: str) -> str:
    """The hook point of a layer in training."""
    return name.removeprefix(SCRATCH)
