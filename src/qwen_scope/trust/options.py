"""What a feature card is told; light enough for `--help`."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_scope.errors import check_count


@dataclass(frozen=True)
class CardOptions:
    """How much a card shows, and what it may measure.

    Attributes:
        n: tokens, neighbours and contexts of each kind.
        effect: measure whether adding the feature makes documents of the concept likelier than others: forward passes
            under it and its controls, minutes on a large model.
        texts: of either kind that the effect is measured on.
        ask: ask the judge that scored the label for what takes one: another label on the same contexts, and FADE's
            measures. A label that no model wrote is judged by rules, which are asked in any case.
        again: measure anew what the store's record holds.
        seed: of what is drawn.

    Raises:
        InputError: a count that is none.
    """

    n: int = 10
    effect: bool = False
    texts: int = 16
    ask: bool = False
    again: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("n", self.n)
        check_count("texts", self.texts, 2)
        check_count("seed", self.seed, 0)
