"""Stores that vLLM's engine fills are those of the transformers engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import served  # noqa: F401  # sets the environment that vLLM reads when it is imported

from qwen_scope import load_scope
from qwen_scope.errors import InputError
from qwen_scope.lab import documents
from qwen_scope.model import HookPoint
from qwen_scope.scope import ExtractOptions, Scope
from qwen_scope.serve import VllmEngine
from qwen_scope.store import FeatureStore
from qwen_scope.text import Corpus

CHUNK = 96  # tokens of a step: several rows share one, and longer rows need several


@pytest.fixture(scope="module")
def scope() -> Scope:
    return load_scope("lab", device="cpu")


@pytest.fixture(scope="module")
def engine(scope: Scope) -> VllmEngine:
    return VllmEngine.of(scope.loaded, batch_tokens=CHUNK, kv_cache_memory_bytes=16 * 2**20)


def compare(mine: FeatureStore, known: FeatureStore) -> int:
    """All is equal but for the last digits of activations and pooled residuals; how many activations there are."""
    assert mine.manifest.counted == known.manifest.counted
    assert mine.left_out() == known.left_out()
    for table in ("documents", "spans", "tokens", "unreadable", "masked"):
        one, other = (store.sql(f"SELECT * FROM {table} ORDER BY ALL") for store in (mine, known))
        assert one.equals(other), table
    one, other = (firings(store) for store in (mine, known))
    both = one.keys() & other.keys()
    assert max(abs(one[key] - other[key]) for key in both) < 1e-4
    apart = [*((one, other, key) for key in one.keys() - both), *((other, one, key) for key in other.keys() - both)]
    assert len(apart) <= len(both) * 1e-4
    last: dict[tuple[int, ...], float] = {}
    for side in (one, other):
        for key, value in side.items():
            last[key[:3]] = min(last.get(key[:3], value), value)
    for side, _, key in apart:  # of two features that are equal but for their last digits one has the last place
        assert abs(side[key] - last[key[:3]]) < 1e-4
    found = len(other)
    for layer in mine.layers if len(known.sql("SELECT * FROM residuals LIMIT 1")) else ():
        for pooling in ("mean", "last"):
            assert np.allclose(
                mine.residuals(layer, pooling), known.residuals(layer, pooling), atol=1e-4, equal_nan=True
            )
    return found


def firings(store: FeatureStore) -> dict[tuple[int, ...], float]:
    found = store.sql("SELECT layer, document, position, feature, value FROM activations")
    columns = [found[name].to_pylist() for name in found.column_names]
    return dict(zip(zip(*columns[:4], strict=True), columns[4], strict=True))


def texts() -> list[str]:
    """Short ones, one longer than a step, and one longer than the lab's context."""
    short = [one.text for one in documents(seed=3, n=25)]
    return [*short, " ".join(short[:4]), " ".join(short * 2)]


def test_the_store_is_that_of_the_transformers_engine_at_all_layers(
    scope: Scope, engine: VllmEngine, tmp_path: Path
) -> None:
    options = ExtractOptions(window_tokens=2048, pool=("mean", "last"))
    with (
        scope.extract(Corpus(texts()), tmp_path / "a", options) as known,
        scope.extract(Corpus(texts()), tmp_path / "b", options, engine=engine) as mine,
    ):
        assert mine.layers == list(range(6))
        assert compare(mine, known) > 30_000


def test_chats_have_their_phases(scope: Scope, engine: VllmEngine, tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]}
        for text in texts()[:12]
    ]
    options = ExtractOptions(chat="default", phases=("answer",))
    with (
        scope.extract(Corpus(chats, column="messages"), tmp_path / "a", options, layers=[1, 4]) as known,
        scope.extract(Corpus(chats, column="messages"), tmp_path / "b", options, layers=[1, 4], engine=engine) as mine,
    ):
        assert compare(mine, known) > 1000
        assert {"phase", "special"} <= set(mine.left_out()[4])


def test_an_interrupted_extraction_goes_on(scope: Scope, engine: VllmEngine, tmp_path: Path) -> None:
    options = ExtractOptions(window_tokens=1024)

    class Broken(VllmEngine):
        """Breaks off in the third window."""

        windows = 0

        def activations(self, rows: Any, points: Any) -> Iterator[Any]:
            Broken.windows += 1
            for i, batch in enumerate(engine.activations(rows, points)):
                if Broken.windows == 3 and i == 2:
                    raise KeyboardInterrupt
                yield batch

    with pytest.raises(KeyboardInterrupt):
        scope.extract(Corpus(texts()), tmp_path / "b", options, layers=[4], engine=Broken("", "", "", 1))
    with (
        scope.extract(Corpus(texts()), tmp_path / "a", options, layers=[4]) as known,
        scope.extract(Corpus(texts()), tmp_path / "b", options, layers=[4], engine=engine) as mine,
    ):
        compare(mine, known)


def test_what_it_does_not_read_is_said(scope: Scope, engine: VllmEngine) -> None:
    with pytest.raises(InputError, match="has one worker, in this process, and tensor_parallel_size asks for 2"):
        VllmEngine.of(scope.loaded, tensor_parallel_size=2)
    with pytest.raises(InputError, match="reads resid_post"):
        next(engine.activations([[1, 2]], [HookPoint(1, "attn_out")]))
