"""What a trainable kind of SAE must answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from qwen_scope.errors import MismatchError
from qwen_scope.sae import SAE

from ..parallel import Ranks
from ..sparse import Active
from ..weights import Exported, Weights

if TYPE_CHECKING:
    from ..config import TrainConfig


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch on its way through the step.

    Attributes:
        x: scaled residuals, `(n, d_model)`.
        n: rows of the whole batch, over all ranks.
        variance: their total variance, the divisor of the losses.
        ranks: what is spread over processes.
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
    """A kind of SAE in training: which features are active, what is lost, and what is saved. Holds no state.

    Attributes:
        name: how `TrainConfig.architecture` calls it.
        options: the fields of `TrainConfig` that only some kinds have and this one uses.
        saved_as: the `architecture` of the SAE it becomes, which is also what it can be continued from.
    """

    name: str
    options: frozenset[str] = frozenset()
    saved_as: str

    def check(self, config: TrainConfig) -> None:  # noqa: B027 - most kinds have nothing more to refuse
        """Raise InputError where an option of this kind has a value that can't be."""

    def extra(self, config: TrainConfig, weights: Weights, x: Tensor, ranks: Ranks) -> dict[str, Tensor]:
        """Tensors this kind adds, from the whole scaled first batch; those that require a gradient are trained."""
        return {}

    def extra_of(self, config: TrainConfig, weights: Weights, sae: SAE) -> dict[str, Tensor]:
        """The same tensors, from the SAE that training continues."""
        return {}

    @abstractmethod
    def choose(self, config: TrainConfig, weights: Weights, x: Tensor, ranks: Ranks) -> tuple[Tensor, Active]:
        """The active entries of a batch and their pre-activations, without a gradient."""

    @abstractmethod
    def forward(self, config: TrainConfig, weights: Weights, batch: Batch, pre: Tensor, active: Active) -> Outcome:
        """Losses and reconstruction from the pre-activations of the active entries."""

    def after(self, config: TrainConfig, weights: Weights, batch: Batch, outcome: Outcome) -> None:  # noqa: B027
        """Whatever this kind keeps up to date after a step."""

    @abstractmethod
    def export(self, weights: Exported, config: TrainConfig) -> SAE:
        """The finished SAE."""

    def accept(self, sae: SAE) -> None:
        """Raise MismatchError unless training can continue from `sae`."""
        if sae.architecture != self.saved_as:
            raise MismatchError(
                f"{sae.identity} is a {sae.architecture} SAE; {self.name} can continue from a {self.saved_as} one"
            )
