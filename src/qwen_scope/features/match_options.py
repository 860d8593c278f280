"""What matching two dictionaries is told; light enough for `--help`."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_scope.errors import InputError, check_count, check_number


@dataclass(frozen=True)
class MatchOptions:
    """From which figures on two features are partners, and how chance is drawn.

    Attributes:
        cosine: the least cosine of two decoder columns that are partners; 0.7 is that of Paulo and Belrose (2025).
        jaccard: the least Jaccard index of the tokens that two partners fire on.
        draws: how many shuffled dictionaries, and shuffled orders of the tokens, tell what chance gives.
        sample: how many features chance is measured on.
        tokens: of stores at most this many tokens are compared, from their beginning.
        tile: features compared with features at a time; memory grows with its square.
        seed: of the draws.

    Raises:
        InputError: a value that can't be.
    """

    cosine: float = 0.7
    jaccard: float = 0.5
    draws: int = 5
    sample: int = 1024
    tokens: int = 2**18
    tile: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"draws": 1, "sample": 1, "tokens": 1, "tile": 1, "seed": 0}.items():
            check_count(name, getattr(self, name), least)
        for name in ("cosine", "jaccard"):
            if not 0 < check_number(name, getattr(self, name)) <= 1:
                raise InputError(f"{name} is above 0 and at most 1, not {getattr(self, name)}")
