"""The kinds of SAE that can be trained: one file and one line each."""

from .base import Architecture
from .batchtopk import BatchTopKTraining
from .jumprelu import JumpReLUTraining
from .matryoshka import MatryoshkaTraining
from .topk import TopKTraining

KINDS = (
    TopKTraining(),
    BatchTopKTraining(),
    MatryoshkaTraining(),
    JumpReLUTraining(),
)

ARCHITECTURES: dict[str, Architecture] = {kind.name: kind for kind in KINDS}

__all__ = ["ARCHITECTURES", "Architecture"]
