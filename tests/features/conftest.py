"""The lab's store, open or as a folder, for tests that only read it."""

from __future__ import annotations

from pathlib import Path

import lab_store
import pytest

from qwen_scope import FeatureStore


@pytest.fixture(scope="session")
def folder() -> Path:
    return lab_store.folder()


@pytest.fixture
def store(folder: Path):
    with FeatureStore(folder) as opened:
        yield opened
