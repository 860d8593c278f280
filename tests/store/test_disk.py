"""An index that the disk has no room for is refused before it is begun."""

from __future__ import annotations

import shutil

import pytest
import stores

from qwen_scope.errors import InputError
from qwen_scope.store import index


def test_an_index_without_room_is_refused_and_what_is_extracted_is_kept(tmp_path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(InputError, match=r"the index of [0-9,]+ activations takes about 0.0 GB .* 0.0 GB are free"):
            stores.make(tmp_path / "s")
    kept = stores.digest(tmp_path / "s")
    assert any(name.startswith("activations/") for name in kept)
    assert not any(name.startswith(("features/", "stats/")) for name in kept)
    stores.make(tmp_path / "s").close()
    stores.make(tmp_path / "t").close()
    assert stores.digest(tmp_path / "s") == stores.digest(tmp_path / "t")


def test_what_a_billion_activations_take(tmp_path, monkeypatch) -> None:
    """10.7 bytes an activation in all, 5.1 of them before the index, and 20 of spill for the largest layer."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=28 * 10**9))
    index.check_disk(tmp_path, [10**9])
    index.check_disk(tmp_path, [3 * 10**7] * 100)
    with pytest.raises(InputError, match=r"2,000,000,000 activations takes about 33.0 GB .* 28.0 GB are free"):
        index.check_disk(tmp_path, [10**9, 10**9])
