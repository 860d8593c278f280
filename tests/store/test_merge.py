"""Shares of a corpus, each extracted alone and merged in any order, are the store of one run."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import stores
import tiny

from qwen_scope.cli import main
from qwen_scope.errors import InputError, NotFoundError
from qwen_scope.scope import ExtractOptions, extract
from qwen_scope.store import TABLES, FeatureStore, merge
from qwen_scope.text import Corpus

WHERE = ["--model", str(tiny.folder() / "model"), "--sae", str(tiny.folder() / "sae"), "--device", "cpu"]
OF = 3


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Three files, some of their rows of no use; the second is named after the third in no alphabet of its own."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps(row) for row in stores.ROWS]
    lines[3:3] = ["{broken", json.dumps({"other": 1}), ""]
    for name, part in (("b", lines[:9]), ("a", lines[9:15]), ("c", lines[15:])):
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in part))
    return folder


def run(corpus: Path, folder: Path, share: int = 1, of: int = 1, **options) -> Path:
    """The store of a share, counted from 1; which tokens count is measured."""
    chosen = {"row_tokens": 7, "window_tokens": 30, "batch_tokens": 80, "pool": ("mean", "last"), **options}
    source = Corpus(corpus, rank=share - 1, world=of)
    extract(source, stores.loaded(), stores.saes(), folder, ExtractOptions(**chosen)).close()
    return folder


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    return run(corpus, tmp_path_factory.mktemp("whole") / "s")


@pytest.fixture(scope="module")
def shares(corpus, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("shares")
    return [run(corpus, folder / str(i), i, OF) for i in range(1, OF + 1)]


def same(found: Path, expected: Path) -> None:
    """Whether two stores hold the same rows; numbers that a model computed to 1e-6, all others exactly."""
    with FeatureStore(found) as a, FeatureStore(expected) as b:
        a.verify()
        assert a.manifest.request == b.manifest.request
        assert a.manifest.layers == b.manifest.layers
        assert (a.manifest.documents, a.manifest.tokens) == (b.manifest.documents, b.manifest.tokens)
        assert a.manifest.unreadable == b.manifest.unreadable
        assert a.manifest.sources["model"] == b.manifest.sources["model"]
        for name in TABLES:
            # Values decide the order of `features`, so that table is compared by its other columns.
            by = " ORDER BY layer, feature, document, position" if name == "features" else ""
            one, other = a.sql(f"SELECT * FROM {name}{by}"), b.sql(f"SELECT * FROM {name}{by}")
            if name in ("masked", "residuals", "activations"):  # by part, and parts are other ones
                keys = [(key, "ascending") for key in one.column_names if key not in ("value", "vector", "reason")]
                one, other = one.sort_by(keys), other.sort_by(keys)
            assert len(one) == len(other) > 0, name
            for column in one.column_names:
                if column in ("value", "sum", "maximum", "minimum"):
                    np.testing.assert_allclose(one[column], other[column], rtol=1e-6, atol=1e-6, err_msg=name)
                elif column == "vector":
                    vectors = (np.stack(table[column].to_numpy()) for table in (one, other))
                    np.testing.assert_allclose(*vectors, rtol=1e-6, atol=1e-6)
                else:
                    assert one[column].to_pylist() == other[column].to_pylist(), (name, column)


@pytest.mark.parametrize("window", [1, 150, 10**6])
def test_merged_shares_equal_one_run_in_any_order(tmp_path, whole, shares, window) -> None:
    given = random.Random(window).sample(shares, OF)
    merge(tmp_path / "s", given, window=window).close()
    same(tmp_path / "s", whole)


def test_a_merge_that_was_stopped_goes_on_and_loses_nothing(tmp_path, corpus, whole, shares) -> None:
    folder = tmp_path / "s"

    def stop(stage: str, share: float, text: str) -> None:
        if share > 0.4:
            raise Killed

    with pytest.raises(Killed):
        merge(folder, shares, stop, window=100)
    with pytest.raises(NotFoundError, match="not finished; run the command that began it again"):
        FeatureStore(folder)
    before = stores.digest(folder)
    with pytest.raises(InputError, match="half merged of shares; finish it with qwen-scope store merge"):
        run(corpus, folder)
    with pytest.raises(InputError, match=r"share 2/3 is given twice"):
        merge(folder, [*shares, shares[1]])
    assert stores.digest(folder) == before
    merge(folder, shares[::-1], window=100).close()
    same(folder, whole)
    assert not (folder / "work").exists()


def test_a_share_that_is_missing_or_does_not_fit_is_named(tmp_path, corpus, whole, shares) -> None:
    other = run(corpus, tmp_path / "other", 2, OF, row_tokens=9)
    fourth = run(corpus, tmp_path / "fourth", 1, 4)
    for given, said in (
        ([shares[2], shares[0]], r"of 3 shares 2/3 is missing; extract with --share 2/3"),
        ([shares[0]], r"of 3 shares 2/3, 3/3 are missing"),
        ([shares[0], other, shares[2]], r"other is a share of another extraction .*row_tokens was 7, now 9"),
        ([*shares, whole], r"is no share of a corpus"),
        ([shares[0], fourth], r"fourth is share 1/4 and .* is one of 3"),
        ([], "name the stores of the shares"),
    ):
        with pytest.raises(InputError, match=said):
            merge(tmp_path / "s", given)
        assert not (tmp_path / "s").exists()
    with pytest.raises(InputError, match="begun with other options"):
        merge(whole, [run(corpus, tmp_path / f"n{i}", i, 2, row_tokens=9) for i in (1, 2)])


def test_thresholds_that_differ_in_last_digits_are_those_of_one_extraction(tmp_path, shares) -> None:
    """Another machine measures the same sample to other last digits; what is further apart is another request."""
    folder = tmp_path / "copy"
    manifest = json.loads((shares[1] / "manifest.json").read_text())
    norms = manifest["request"]["counted"]["norms"]
    for factor, fits in ((1.0002, True), (1.1, False)):
        changed = json.loads(json.dumps(manifest))
        changed["request"]["counted"]["norms"] = {point: n and n * factor for point, n in norms.items()}
        if not folder.exists():
            folder.mkdir()
            for part in shares[1].iterdir():
                if part.is_dir():
                    (folder / part.name).mkdir()
                    for file in part.iterdir():
                        (folder / part.name / file.name).write_bytes(file.read_bytes())
        (folder / "manifest.json").write_text(json.dumps(changed))
        if fits or not any(norms.values()):
            merge(tmp_path / str(factor), [shares[0], folder, shares[2]]).close()
        else:
            with pytest.raises(InputError, match="another extraction"):
                merge(tmp_path / str(factor), [shares[0], folder, shares[2]])


def test_more_shares_than_documents(tmp_path) -> None:
    (tmp_path / "c.txt").write_text("hello hello\n\nOne more, please.\n")
    made = [run(tmp_path / "c.txt", tmp_path / str(i), i, 4) for i in range(1, 5)]
    with FeatureStore(made[3]) as empty:
        assert (empty.manifest.documents, empty.manifest.tokens) == (0, 0)
        assert empty.stats(0)["tokens"].to_pylist() == [0] * empty.layer(0).d_sae
    whole = run(tmp_path / "c.txt", tmp_path / "whole")
    with merge(tmp_path / "s", made) as merged, FeatureStore(whole) as one:
        assert merged.sql("SELECT * FROM tokens") == one.sql("SELECT * FROM tokens")


def test_a_share_of_what_is_read_once_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="can be read only once, so a share of it can't be"):
        extract(Corpus(iter(stores.TEXTS), world=2), stores.loaded(), stores.saes(), tmp_path / "s")


@pytest.mark.parametrize("share", ["0/3", "4/3", "3", "1/0", "-1/3", "a/b", "1.5/3"])
def test_a_share_that_there_is_not(share, tmp_path, capsys) -> None:
    assert main(["extract", "lab", "-o", str(tmp_path / "s"), f"--share={share}", "--sample", "4"]) == 2
    many = "3" if share.endswith("/3") and share[0] in "04" else "16"
    expected = f"is no share; write its number and how many there are, from 1/{many} to {many}/{many}"
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_shares_of_the_command_line(tmp_path, capsys, corpus) -> None:
    for i in (1, 2):
        argv = ["extract", str(corpus), "-o", str(tmp_path / str(i)), *WHERE, "--row", "7", "--share", f"{i}/2"]
        assert main(argv) == 0
    capsys.readouterr()
    assert main(["store", "merge", str(tmp_path / "2"), "-o", str(tmp_path / "s")]) == 2
    assert "of 2 shares 1/2 is missing" in capsys.readouterr().err
    assert main(["store", "merge", str(tmp_path / "2"), str(tmp_path / "1"), "-o", str(tmp_path / "s"), "--json"]) == 0
    merged = json.loads(capsys.readouterr().out)
    assert (merged["documents"], merged["unreadable"]) == (17, {"bad JSON": 1, "missing column": 1})
    for argv in (["store", str(tmp_path / "s")], ["store", "show", str(tmp_path / "s")]):
        assert main(argv) == 0
        assert "17 documents" in " ".join(capsys.readouterr().out.split())
