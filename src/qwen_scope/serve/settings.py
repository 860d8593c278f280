"""`ServeSettings`: what a server offers; plain data that every process of vLLM reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from qwen_scope.errors import InputError, check_count
from qwen_scope.files import Fields

ROWS = 8
"""Rows of the tables for one request, by default: one for each combination of sums that its tokens can have."""

_LAYERS = ("layers", "feature_layers", "read_layers", "tap_layers")


@dataclass(frozen=True)
class ServeSettings:
    """What is served, and within which bounds.

    Attributes:
        sae: the source of the SAEs, as `load_sae` takes it; None for directions alone.
        k: for SAEs whose files and name do not say it.
        layers: where vectors can be added, of features and of plain directions.
        feature_layers: where every operation is served: `scale`, `clamp`, `floor`, `cap`, `ablate` and `add`.
        read_layers: where activations can be read.
        tap_layers: where an engine in this process reads the stream itself; a server has none.
        recipes: the folder of recipes that requests can name, or None.
        watch: a file of rules that are asked of every request (`watch.read_watches`), or None.
        stats: a file of statistics by layer, which units other than `raw` need, or None.
        rows: of the tables, for each of the requests that run together.

    Raises:
        InputError: a layer twice or below 0, no layer at all, or features to set or read without SAEs.
    """

    sae: str | None = None
    k: int | None = None
    layers: tuple[int, ...] = ()
    feature_layers: tuple[int, ...] = ()
    read_layers: tuple[int, ...] = ()
    tap_layers: tuple[int, ...] = ()
    recipes: str | None = None
    watch: str | None = None
    stats: str | None = None
    rows: int = ROWS

    def __post_init__(self) -> None:
        for name in _LAYERS:
            given = getattr(self, name)
            for layer in given:
                check_count("a layer", layer, 0)
            if len(set(given)) < len(given):
                raise InputError(f"{name} names a layer twice: {', '.join(map(str, given))}")
        if not self.touched:
            raise InputError("a server needs at least one layer: name layers, feature_layers or read_layers")
        if self.sae is None and (self.feature_layers or self.read_layers):
            raise InputError("setting and reading features needs SAEs; name them, or serve `layers` alone")
        check_count("rows", self.rows, 1, 4096)

    @property
    def adding(self) -> tuple[int, ...]:
        """Where vectors can be added."""
        return tuple(sorted({*self.layers, *self.feature_layers}))

    @property
    def touched(self) -> tuple[int, ...]:
        """Every layer whose block is changed."""
        return tuple(sorted({*self.adding, *self.tapped}))

    @property
    def tapped(self) -> tuple[int, ...]:
        """Where the stream is copied at the end of the block."""
        return tuple(sorted({*self.read_layers, *self.tap_layers}))

    def capacity(self, requests: int) -> int:
        """Rows of each table where so many requests run together."""
        return 1 + self.rows * requests

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Any) -> ServeSettings:
        """What `to_json` wrote; keys may be missing.

        Raises:
            FormatError: an unknown key, or a value of the wrong kind.
            InputError: as in the class.
        """
        known = [field.name for field in fields(cls)]
        found = Fields(data, "the settings of the server", (), known)
        layers = {name: found.counts(name) for name in _LAYERS if name in data}
        texts = {name: found.maybe(found.text, name) for name in ("sae", "recipes", "watch", "stats")}
        counts: Mapping[str, Any] = {name: found.count(name) for name in ("rows",) if name in data}
        return cls(**texts, k=found.maybe(found.count, "k"), **layers, **counts)
