"""Verdicts on pairs of SAE and language model, kept in the user's state folder under the fingerprints of both.

```
QWEN_SCOPE_STATE, or $XDG_STATE_HOME/qwen-scope, or ~/.local/state/qwen-scope (Windows: %LOCALAPPDATA%/qwen-scope)
  verdicts/
    <digest of the SAE's fingerprint>-<beginning of the model's>.json      one layer on one model
```
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwen_scope.errors import FormatError, InputError, QwenScopeWarning
from qwen_scope.files import Fields, read_object, write_text

from .saes import brief

STATE = "QWEN_SCOPE_STATE"
FORMAT, VERSION = "qwen-scope verdict", 1
"""The version rises when the rule of docs/fits.md changes: a verdict by another rule is none."""

FITS, LOSSES, DO_NOT_USE, UNTOLD = "fits", "fits with losses", "do not use", "not enough text"
WORDS = (FITS, LOSSES, DO_NOT_USE)
"""The verdicts that are kept."""

DIGITS = 20  # of a digest in a file's name


@dataclass(frozen=True)
class Verdict:
    """What `qwen-scope eval --post` found of one SAE on one language model.

    Attributes:
        verdict: `fits`, `fits with losses` or `do not use`.
        sae, model: the fingerprints of the SAE and of the model's weights.
        layers: the verdict of every layer that was measured in the same run, by layer.
        base: the name of the checkpoint that it was compared with; None where the pair was measured alone.
        tokens, documents: how many it was measured on.   corpus: of which text.   date: when, as 2026-11-28.
        figures: value, low and high end of each interval, by name.
        phases: the verdict of each phase of conversations.
    """

    verdict: str
    sae: str
    model: str
    layers: Mapping[int, str]
    base: str | None
    tokens: int
    documents: int
    corpus: str
    date: str
    figures: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    phases: Mapping[str, str] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """One line for all layers of the run, the worst first."""
        order = sorted(self.layers)
        by_word = {word: [layer for layer in order if self.layers[layer] == word] for word in reversed(WORDS)}
        words = [
            f"{word} at layer{'s' * (len(layers) > 1)} {brief(layers)}" for word, layers in by_word.items() if layers
        ]
        beside = "measured without its base" if self.base is None else f"compared with {self.base:.100}"
        return (
            f"these SAEs on this model: {'; '.join(words)} ({beside} on {self.tokens:,} tokens of {self.corpus:.100},"
            f" {self.date})"
        )

    def to_json(self) -> dict[str, Any]:
        """As values of JSON."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, data: Any, what: str) -> Verdict:
        """What `to_json` gave.

        Raises:
            FormatError: it is none.
        """
        read = Fields(data, what, ["format", "version", *cls.__dataclass_fields__])
        read.header(VERSION, FORMAT)
        layers = {whole(layer, what): word_of(word, what) for layer, word in read.object("layers").items()}
        figures = {}
        for name, values in read.object("figures").items():
            three = Fields({name: values}, what).numbers(name)
            if len(three) != 3:
                raise FormatError(f"{name!r} of {what} has {len(three)} numbers, not 3")
            figures[str(name)] = three
        return cls(
            word_of(read.text("verdict"), what),
            read.text("sae"),
            read.text("model"),
            layers,
            read.maybe(read.text, "base"),
            read.count("tokens"),
            read.count("documents"),
            read.text("corpus"),
            read.text("date"),
            figures,
            {str(phase): str(word) for phase, word in read.object("phases").items()},
        )


def word_of(word: Any, what: str) -> str:
    """One of `WORDS`, or FormatError."""
    if word not in WORDS:
        raise FormatError(f"a verdict of {what} is none of {', '.join(WORDS)}")
    return word


def whole(layer: Any, what: str) -> int:
    """The number of a layer, or FormatError."""
    if not (isinstance(layer, str) and layer.isascii() and layer.isdigit() and len(layer) <= 6):
        raise FormatError(f"a layer of {what} is no number")
    return int(layer)


def state_folder() -> Path | None:
    """Where this user's state is kept; None where there is no home.

    `QWEN_SCOPE_STATE` names it; else it follows the XDG base directories, by which a path that is not absolute is
    ignored.
    """
    if named := os.environ.get(STATE):
        return Path(named).expanduser()
    home = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_STATE_HOME", "")
    if os.path.isabs(home):
        return Path(home) / "qwen-scope"
    found = os.path.expanduser("~/.local/state")
    return Path(found) / "qwen-scope" if os.path.isabs(found) else None


def place_of(sae: str, model: str) -> str:
    """The name of the file of a pair. Fingerprints come from files of others, so none becomes a path."""
    return f"{digest(sae)}-{digest(model)}.json"


def digest(fingerprint: str) -> str:
    """The beginning of a digest, in hexadecimal digits."""
    return hashlib.sha256(fingerprint.encode("utf-8", "replace")).hexdigest()[:DIGITS]


def remember(verdict: Verdict) -> Path | None:
    """Keep a verdict, in the place of an earlier one of the same pair; says in a warning where that can't be done.

    Several processes may: a file is written whole or not at all, and the last one stands.
    """
    folder = state_folder()
    why = "there is no home folder"
    if folder is not None and verdict.sae and verdict.verdict in WORDS:
        path = folder / "verdicts" / place_of(verdict.sae, verdict.model)
        try:
            write_text(path, json.dumps(verdict.to_json(), indent=1) + "\n")
        except (InputError, OSError) as error:
            why = str(error)
        else:
            return path
    warnings.warn(f"the verdict is not remembered: {why}; name a folder with {STATE}", QwenScopeWarning, stacklevel=2)
    return None


def remembered(sae: str) -> list[Path]:
    """The files of verdicts on an SAE, whatever the model."""
    folder = state_folder()
    if folder is None or not sae:
        return []
    mine = digest(sae)
    try:
        return [path for path in (folder / "verdicts").iterdir() if path.name.startswith(f"{mine}-")]
    except OSError:
        return []


def recall(sae: str, model: Callable[[], str | None]) -> Verdict | None:
    """The verdict on a pair, if one was made by the present rule.

    A file that is none is passed over with a warning; one by an earlier rule without one.

    Args:
        sae: the SAE's fingerprint.   model: gives that of the model, asked only where something is known of the SAE.
    """
    known = remembered(sae)
    if not known or (of_model := model()) is None:
        return None
    path = known[0].with_name(place_of(sae, of_model))
    if path not in known:
        return None
    try:
        if not path.is_file():
            raise FormatError(f"{path} is no file")
        data = read_object(path)
        if data.get("format") == FORMAT and type(data.get("version")) is int and data["version"] != VERSION:
            return None
        found = Verdict.from_json(data, str(path))
        if (found.sae, found.model) != (sae, of_model):
            raise FormatError(f"{path} is about another pair")
    except (FormatError, OSError) as error:
        warnings.warn(
            f"a remembered verdict is passed over: {error}; delete the file, or measure again with qwen-scope eval"
            " --post",
            QwenScopeWarning,
            stacklevel=2,
        )
        return None
    return found
