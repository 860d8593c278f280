"""One store of the lab, which tests read and copy: talk in three languages, and repetition, layers 2 and 5."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_scope import FeatureStore, load_scope
from qwen_scope.lab import documents
from qwen_scope.model import LoadedModel
from qwen_scope.scope import ExtractOptions, Scope, extract
from qwen_scope.text import Corpus, Counted

LAYER, OTHER = 5, 2


@functools.cache
def scope() -> Scope:
    return load_scope("lab", device="cpu")


@functools.cache
def folder() -> Path:
    """Made once per test process; only the notes change, where commands keep what they measured."""
    rows = [
        {"text": d.text, "language": d.language, "kind": d.kind, "n": i}
        for language in ("de", "en", "zh")
        for i, d in enumerate(documents(seed=5, n=16, kinds=["talk"], languages=[language]))
    ]
    rows += [{"text": d.text, "kind": d.kind} for d in documents(seed=5, n=12, kinds=["repetition"])]
    out = Path(tempfile.mkdtemp(prefix="qwen-scope-lab-store-")) / "store"
    saes = {layer: scope().saes[layer] for layer in (OTHER, LAYER)}
    everything = ExtractOptions(counted=Counted.everything())
    loaded = LoadedModel(scope().model, scope().tokenizer, "lab")
    extract(Corpus(rows, name="small"), loaded, saes, out, everything).close()
    return out


def copied(to: Path) -> Path:
    """A copy without notes, into which a test may write some."""
    return Path(shutil.copytree(folder(), to / "store", ignore=shutil.ignore_patterns("notes.jsonl")))


@pytest.fixture(name="folder", scope="session")
def a_folder() -> Path:
    return folder()


@pytest.fixture(name="store")
def a_store() -> Iterator[FeatureStore]:
    with FeatureStore(folder()) as opened:
        yield opened
