"""What a trainable kind of SAE must answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qwen_scope.errors import MismatchError
from qwen_scope.sae import SAE

from ..parallel import Ranks
from ..shape import RunShape
from ..sparse import Active
from ..weights import Exported, Weights


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch on its way through the step.

    Attributes:
        x: scaled residuals, `(n, d_model)`.
        n: rows of the whole batch, over all ranks.
        variance: their total variance, the divisor of the losses.
        ranks: what is divided among processes.
    """

    x: Tensor
    n: float
    variance: Tensor
    ranks: Ranks


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the forward pass gives.

    Attributes:
        loss: what this kind lowers, AuxK not included; in data-parallel training the share of these rows.
        x_hat: the full reconstruction, `(n, d_model)`.
        acts: the activations of the active entries, zero where one only takes part in the gradient.
    """

    loss: Tensor
    x_hat: Tensor
    acts: Tensor


class Architecture(ABC):
    """A kind of SAE in training: which features are active, what is lost, and what is saved.

    An implementation is a frozen dataclass whose fields are its options, each with a default and a line in the
    docstring's `Attributes`; the command `train` offers them by these names. It changes nothing in itself.

    Attributes:
        name: how `TrainConfig.architecture` calls it.
        saved_as: the `architecture` of the SAE it becomes, which is also what it can be continued from.
    """

    name: ClassVar[str]
    saved_as: ClassVar[str]

    def check(self, shape: RunShape) -> None:  # noqa: B027 - most kinds have nothing more to refuse
        """Raise InputError where a run of this shape can't be trained."""

    def extra(self, shape: RunShape, weights: Weights, x: Tensor, ranks: Ranks) -> dict[str, Tensor]:
        """Tensors this kind adds, from the whole scaled first batch; those that require a gradient are trained."""
        return {}

    def extra_of(self, shape: RunShape, weights: Weights, sae: SAE) -> dict[str, Tensor]:
        """The same tensors, from the SAE that training continues."""
        return {}

    @abstractmethod
    def choose(self, shape: RunShape, weights: Weights, x: Tensor, ranks: Ranks) -> tuple[Tensor, Active]:
        """The active entries of a batch and their pre-activations, without a gradient."""

    @abstractmethod
    def forward(self, shape: RunShape, weights: Weights, batch: Batch, pre: Tensor, active: Active) -> Outcome:
        """Losses and reconstruction from the pre-activations of the active entries."""

    def after(self, shape: RunShape, weights: Weights, batch: Batch, outcome: Outcome) -> None:  # noqa: B027
        """Whatever this kind keeps up to date after a step."""

    @abstractmethod
    def export(self, weights: Exported, shape: RunShape) -> SAE:
        """The finished SAE."""

    def accept(self, sae: SAE) -> None:
        """Raise MismatchError unless training can continue from `sae`."""
        if sae.architecture != self.saved_as:
            raise MismatchError(
                f"{sae.identity} is a {sae.architecture} SAE; {self.name} can continue from a {self.saved_as} one"
            )
