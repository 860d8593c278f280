"""What an architecture knows of the run that it is trained in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunShape:
    """The dictionary and the length of a run.

    Attributes:
        d_sae: the number of features.
        k: features active per token.
        steps: of the run.
    """

    d_sae: int
    k: int
    steps: int
