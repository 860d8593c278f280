"""What `label` is told; light enough for `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qwen_scope.errors import check_count

FEWEST = 4


@dataclass(frozen=True)
class LabelOptions:
    """How much is shown and asked.

    Attributes:
        examples: contexts the name is made from: half the strongest, half from all strengths.
        tests: held-out contexts where the feature fires, and as many where it does not.
        seed: of the draws.
    """

    examples: int = 20
    tests: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("the examples of a label", self.examples, 2)
        check_count("the tests of a label", self.tests, FEWEST)
        check_count("the seed", self.seed, 0)


@dataclass(frozen=True)
class JudgeOptions:
    """Who names features and tests the names, within what limits.

    Attributes:
        summary: ask no model: a name says by rule which script, language, kind or list of tokens a feature fires on.
            So it is, too, where the environment names no model.
        judge: the model to ask; None takes OPENAI_MODEL.
        max_requests, max_tokens: the budget; None for no limit.
        concurrency: requests at a time.
        cache: where answers are kept; None keeps them beside the store, in STORE.cache.
    """

    summary: bool = False
    judge: str | None = None
    max_requests: int | None = None
    max_tokens: int | None = None
    concurrency: int = 8
    cache: Path | None = None
