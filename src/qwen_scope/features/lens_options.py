"""What a Jacobian lens is fitted on, and what is read through one; light enough for `--help`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from qwen_scope.errors import InputError, check_count


@dataclass(frozen=True)
class LensOptions:
    """What a lens is fitted on.

    Attributes:
        prompts: how many.
        length: tokens of each at most.
        skip: tokens at the beginning of each that are neither source nor target (16 in the published lenses).
        layers: from which; None for all but the last.

    Raises:
        InputError: a number that is out of range.
    """

    prompts: int = 100
    length: int = 128
    skip: int = 16
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_count("prompts", self.prompts)
        check_count("length", self.length, 2)
        check_count("skip", self.skip, 0)
        if self.length < self.skip + 2:
            raise InputError(f"length must be at least skip + 2, {self.skip + 2}; got {self.length}")


@dataclass(frozen=True)
class PromoteOptions:
    """Which words features are asked about, and how features are read.

    Attributes:
        promotes: the words, with spaces between them; None asks nothing.
        lens: the file of a Jacobian lens; None reads features directly.
    """

    promotes: str | None = None
    lens: str | os.PathLike[str] | None = None
