"""An index that the disk has no room for is refused before it is begun."""

from __future__ import annotations

import shutil

import numpy as np
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
    """10.7 bytes an activation in all, 5.1 of them before the index, and 26 of spill for those sorted at once."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=20 * 10**9))
    index.check_disk(tmp_path, [10**9, 10**9])
    index.check_disk(tmp_path, [3 * 10**7] * 100)
    with pytest.raises(InputError, match=r"4,000,000,000 activations takes about 27.6 GB .* 20.0 GB are free"):
        index.check_disk(tmp_path, [10**9] * 4)


def test_a_layer_sorted_in_ranges_of_features_is_the_same_store(tmp_path, monkeypatch) -> None:
    stores.make(tmp_path / "s").close()
    asked: list[int] = []
    whole = index.in_ranges

    def counting(tokens: np.ndarray) -> list[tuple[int, int]]:
        asked.append(len(found := whole(tokens)))
        return found

    monkeypatch.setattr(index, "AT_ONCE", 40)
    monkeypatch.setattr(index, "in_ranges", counting)
    stores.make(tmp_path / "t").close()
    assert min(asked) > 2
    assert stores.digest(tmp_path / "s") == stores.digest(tmp_path / "t")


def test_ranges_hold_every_feature_once_and_no_more_than_fits(monkeypatch) -> None:
    monkeypatch.setattr(index, "AT_ONCE", 10)
    assert index.in_ranges(np.array([4, 6, 1, 0, 25, 0, 9, 1])) == [(0, 1), (2, 3), (4, 4), (5, 2**31 - 1)]
    assert index.in_ranges(np.array([0, 0])) == [(0, 2**31 - 1)]
    assert index.in_ranges(np.array([25, 0, 3])) == [(0, 0), (1, 2**31 - 1)]
