"""The architectures of SAEs: one file and one line each. Files name them by `architecture`."""

from __future__ import annotations

from .base import SAE
from .jumprelu import JumpReLU
from .topk import TopK

KINDS: dict[str, type[SAE]] = {
    kind.architecture: kind
    for kind in (
        TopK,
        JumpReLU,
    )
}
