"""`Label`: what a feature is called and how well that holds, as the record of a store keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qwen_scope.stats import Interval

CHANCE = 0.5  # the balanced accuracy of guessing
SCORES = ("detection", "fuzzing", "random")


@dataclass(frozen=True)
class Label:
    """A name for a feature with how well it holds; there is no label without its scores.

    Attributes:
        text: the name.
        detection: balanced accuracy of telling from the name in which contexts the feature fires.
        fuzzing: the same of telling whether the right tokens are marked.
        source: the model that wrote it, or `summary` where no model did, but rules or a list of typical tokens.
        random: the detection of labels of other features on the same contexts, where it was measured: the control.
        scorer: who judged: a model, `rules`, or `tokens` for the rule that looks for the typical tokens.
    """

    text: str
    detection: Interval
    fuzzing: Interval
    source: str
    scorer: str
    random: Interval | None = None

    @property
    def by_model(self) -> bool:
        """Whether a language model wrote it."""
        return self.source != "summary"

    @property
    def at_chance(self) -> bool:
        """Whether the interval of its detection reaches chance, or that of labels of other features: then nothing says
        that the name fits the feature."""
        return self.detection.low <= (CHANCE if self.random is None else max(CHANCE, self.random.high))

    @property
    def shown(self) -> str:
        """The name as it is shown everywhere; one at chance says so."""
        return f"[at chance] {self.text}" if self.at_chance else self.text

    @property
    def score(self) -> float:
        """The mean of both balanced accuracies: 0.5 is chance."""
        return (self.detection.estimate + self.fuzzing.estimate) / 2

    def to_json(self) -> dict[str, Any]:
        """Plain values; a control that was not measured is left out."""
        return {name: value for name, value in asdict(self).items() if name != "random" or value is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Label:
        """What `to_json` wrote."""
        scores = {name: Interval(**data[name]) for name in SCORES if data.get(name) is not None}
        return cls(**{**data, **scores})
