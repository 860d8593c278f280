"""The shares in which kinds, languages, registers, drifts and repetitions are drawn."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True)
class Mixture:
    """Weights per choice; each table is normalised when drawn from.

    `drift` maps the language a document starts in to the languages it may switch to; the sum of a row is that
    language's share of the drifting documents. `sentences` is not a table of weights: a talk has at least its first and
    at most its second number of sentences, all equally often.
    """

    kinds: Mapping[str, float]
    languages: Mapping[str, float]
    registers: Mapping[str, float]
    chat: Mapping[str, float]
    drift: Mapping[str, Mapping[str, float]]
    repetition: Mapping[str, float]
    sentences: tuple[int, int]


@cache
def default_mixture() -> Mixture:
    """The mixture of `mixture.toml`."""
    raw = (resources.files("qwen_scope.lab") / "mixture.toml").read_text(encoding="utf-8")
    data = tomllib.loads(raw)
    rows, sentences = data.pop("drift"), data.pop("sentences")
    return Mixture(
        sentences=(sentences["shortest"], sentences["longest"]),
        drift={source: _floats(row) for source, row in rows.items()},
        **{name: _floats(table) for name, table in data.items()},
    )


def _floats(table: Mapping[str, int | float]) -> dict[str, float]:
    return {name: float(weight) for name, weight in table.items()}
