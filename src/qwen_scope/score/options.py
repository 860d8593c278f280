"""What a scoreboard is told; light enough for `--help`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_scope.errors import InputError, NotFoundError, check_count, nearest
from qwen_scope.text import CorpusOptions, longest_text

LABELLED = ("probes", "tpp", "scr", "contrast")
NAMES = (*LABELLED, "absorption", "steering")
"""The suites; the first read labelled texts."""


@dataclass(frozen=True)
class ScoreRun:
    """One scoreboard.

    Attributes:
        sae: group, folder or Hub id of the SAEs.
        data: where the text is, as `Corpus` takes it. Every `hold_out`-th document is measured on, and the controls are
            trained on the others.
        out: the folder of the scoreboard: what is done stays there, and the same run goes on.
        model: `lab`, or folder or Hub id of the language model.
        layers: None means all that the group has.
        corpus: how the documents are read.
        tokens: about how many to measure on.
        train_tokens: how many each control is trained on.
        controls: measure the controls, too.
        suites: further figures, by name (`SUITES`); None for all that can be measured.
        probes: the folder or wheel of sae-probes, whose labelled texts suites read; None for none.
        columns: columns of the corpus that are labels, in place of sae-probes' texts.
        datasets: of the labelled texts these alone; None for all of two classes.   rows: texts of each at most.
        context_length: tokens per row.   batch_size: rows per forward pass.   batch: tokens per step of training.
        hold_out: which documents are measured on.
        budget: bytes of residuals that training holds at once.
        dtype, device: of the language model.
        seed: of the controls.

    Raises:
        InputError: a value that can't be.
    """

    sae: str
    data: str
    out: Path
    model: str = "lab"
    layers: tuple[int, ...] | None = None
    corpus: CorpusOptions = field(default_factory=CorpusOptions)
    tokens: int = 65536
    train_tokens: int = 1_000_000
    controls: bool = True
    suites: tuple[str, ...] | None = None
    probes: Path | None = None
    columns: tuple[str, ...] | None = None
    datasets: tuple[str, ...] | None = None
    rows: int = 700
    context_length: int = 256
    batch_size: int = 16
    batch: int = 4096
    hold_out: int = 10
    budget: int = 10**9
    dtype: str = "auto"
    device: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {"tokens": 2, "train_tokens": 1, "context_length": 2, "batch_size": 1, "batch": 1, "hold_out": 2}
        counts["rows"] = 40
        for name, least in {**counts, "budget": 1, "seed": 0}.items():
            check_count(name, getattr(self, name), least)
        if self.probes is not None and self.columns:
            raise InputError("labelled texts are those of probes or of the corpus' columns; give one of the two")
        for name in self.suites or ():
            if name not in NAMES:
                raise NotFoundError(f"there is no suite {name!r}; {nearest(name, NAMES)}")
            if name in LABELLED and not (self.probes or self.columns):
                raise InputError(f"{name} reads labelled texts; name them with probes= or columns=")
        if self.controls and self.train_tokens < self.batch:
            raise InputError(f"train_tokens={self.train_tokens} is less than one batch of {self.batch}; lower batch")

    @property
    def longest(self) -> int:
        """Characters above which a text is cut, as in training."""
        return longest_text(self.context_length)

    def to_json(self) -> dict[str, Any]:
        """What decides the figures, as plain values."""
        names = (
            "sae", "data", "model", "tokens", "train_tokens", "context_length", "batch_size", "batch", "hold_out",
            "dtype", "seed", "rows", "columns",
        )  # fmt: skip
        # Folders that were begun while documents were read in another order say so, or nothing, and can't go on.
        own = {name: getattr(self, name) for name in names}
        order = f"shuffled, texts cut at {self.longest} characters"
        return {**own, "corpus": dict(vars(self.corpus)), "order": order}
