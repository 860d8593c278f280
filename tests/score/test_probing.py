"""Sparse probing restated with dense arithmetic, and the reading of the datasets from a wheel."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
import pytest
import tiny
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from qwen_scope.cli import main
from qwen_scope.errors import FormatError, InputError, NotFoundError
from qwen_scope.model import HookPoint, capture, load_model
from qwen_scope.sae import TopK
from qwen_scope.score import ColumnData, ProbeData, ScoreRun, Split, balanced_split, cost, probe, ranking, read_split
from qwen_scope.score.probing import last_residuals
from qwen_scope.text import Corpus, CorpusOptions

LIST = "probing_datasets_MASTER.csv.zst"


def packed(table: pa.Table) -> bytes:
    plain, out = io.BytesIO(), pa.BufferOutputStream()
    pc.write_csv(table, plain)
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(plain.getvalue())
    return out.getvalue().to_pybytes()


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """Two binary datasets and one that is not, as the wheel holds them."""
    kinds = [("1_east", "Binary Classification"), ("2_year", "Continuous Data"), ("3_short", "Binary Classification")]
    columns = {
        "Dataset save name": [f"cleaned_data/{name}.csv" for name, _ in kinds],
        "Data type": [k for _, k in kinds],
    }
    texts = [f"车站在哪里 {i}" if i % 2 else f"hello,\nfriend {i}" for i in range(60)]
    east = {"prompt": texts, "prompt_len": [3] * 60, "target": [bool(i % 2) for i in range(60)]}
    short = {"prompt": ["a", "b"], "prompt_len": [1, 1], "target": ["y", "x"]}
    tables = {LIST: columns, "cleaned_data/1_east.csv.zst": east, "cleaned_data/3_short.csv.zst": short}
    return {name: packed(pa.table(columns)) for name, columns in tables.items()}


@pytest.fixture(scope="module")
def wheel(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wheel") / "sae_probes-0.4.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("sae_probes/__init__.py", "raise ImportError('its code is not run')")
        for name, data in files.items():
            out.writestr(f"sae_probes/data/{name}", data)
    return path


def test_datasets_are_read_from_wheel_and_folder(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    for place in (wheel, tmp_path, tmp_path / "sae_probes", tmp_path / "sae_probes" / "data"):
        data = ProbeData(place)
        assert data.names == ["1_east", "3_short"]
        east = data.read("1_east")
        assert len(east.texts) == 60
        assert east.texts[0] == "hello,\nfriend 0"
        assert east.y.tolist() == [0, 1] * 30
    assert data.read("3_short").y.tolist() == [1, 0]
    with pytest.raises(NotFoundError, match="no dataset '1_west'; did you mean '1_east'"):
        data.read("1_west")


def test_another_place_is_one_sentence(tmp_path: Path, files: dict[str, bytes]) -> None:
    (tmp_path / "x.whl").write_text("no zip")
    for place in (tmp_path / "none", tmp_path / "x.whl"):
        with pytest.raises(NotFoundError, match="neither a folder nor a wheel"):
            ProbeData(place)
    with pytest.raises(NotFoundError, match="it is not the package sae-probes"):
        ProbeData(tmp_path)
    with pytest.raises(NotFoundError, match="pip download --no-deps sae-probes"):
        ProbeData()
    (tmp_path / LIST).write_bytes(files[LIST][:20])
    with pytest.raises(FormatError, match="can't be read"):
        ProbeData(tmp_path)


def test_the_split_is_that_of_sae_probes() -> None:
    """What `get_train_test_indices` of sae-probes 0.4.2 gives for these labels, and what a split has to be."""
    y = np.array([i % 3 == 0 for i in range(60)], np.int64)
    train, test = balanced_split(y, 10, 6)
    assert train.tolist() == TRAIN
    assert test.tolist() == TEST
    assert y[train].sum() == 5
    assert y[test].sum() == 3
    assert not set(train) & set(test)
    with pytest.raises(InputError, match="20 and 40 texts of the two classes are too few for 30 to train and 12"):
        balanced_split(y, 30, 12)


TRAIN = [16, 35, 45, 3, 8, 1, 11, 51, 24, 0]
TEST = [22, 10, 18, 54, 48, 4]


@pytest.fixture(scope="module")
def problem() -> tuple[TopK, Split]:
    """A direction that tells the classes, in an SAE of random features."""
    rng = np.random.default_rng(0)
    y = np.arange(240) % 2
    x = rng.normal(size=(240, 24)) + 2.0 * y[:, None] * (np.arange(24) == 3)
    torch.manual_seed(1)
    columns = torch.randn(24, 80)
    sae = TopK(columns.T.contiguous(), columns, torch.zeros(80), torch.zeros(24), k=12)
    split = Split(torch.from_numpy(x.astype(np.float32)), y.astype(np.int64), np.arange(160), np.arange(160, 240))
    return sae, split


def test_features_are_ranked_by_their_scaled_difference_of_means(problem: tuple[TopK, Split]) -> None:
    sae, split = problem
    acts = sae.encode(split.x)
    dense = acts.to_dense().double().numpy()
    typical = dense.sum(0) / ((dense > 0).sum(0) + 1e-6) + 1e-6
    scaled = dense / typical
    apart = np.abs(scaled[split.y == 1].mean(0) - scaled[split.y == 0].mean(0))
    found = ranking(acts, split.y)
    np.testing.assert_allclose(apart[found], np.sort(apart)[::-1], atol=1e-9)


def test_a_probe_is_a_regression_whose_strength_was_chosen_on_its_own_texts(problem: tuple[TopK, Split]) -> None:
    """As sae-probes' `find_best_reg` does it, written out."""
    sae, split = problem
    found = probe(sae, split, "x", ks=(1, 5))
    dense = sae.encode(split.x).to_dense().numpy()
    ranked = ranking(sae.encode(split.x[:160]), split.y[:160])
    cases: list[tuple[float | None, np.ndarray, dict[str, Any]]] = [
        (found.features[k], dense[:, ranked[:k]], {"penalty": "l1", "solver": "saga"}) for k in (1, 5)
    ]
    cases.append((found.residual, split.x.numpy(), {}))
    for value, x, how in cases:
        best: tuple[float, float] = (-1.0, 0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for strength in np.logspace(5, -5, 10):
                model = LogisticRegression(C=strength, random_state=1, max_iter=1000, **how).fit(x[:128], split.y[:128])
                score = roc_auc_score(split.y[128:160], model.predict_proba(x[128:160])[:, 1])
                best = (score, strength) if score > best[0] else best
            model = LogisticRegression(C=best[1], random_state=1, max_iter=1000, **how).fit(x[:160], split.y[:160])
        assert value == pytest.approx(roc_auc_score(split.y[160:], model.predict_proba(x[160:])[:, 1]), abs=0.005)
    assert (found.train, found.test) == (160, 80)
    assert found.residual is not None
    assert found.residual > 0.6


def test_residuals_are_those_of_the_last_token() -> None:
    loaded, point = load_model(str(tiny.folder() / "model"), device="cpu"), HookPoint(1)
    ids = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [6, 7]]
    found = last_residuals(loaded, point, ids, batch=3)
    for row, x in zip(ids, found, strict=True):
        alone = capture(loaded.model, torch.tensor([row]), [point])[point][0, -1]
        torch.testing.assert_close(x, alone, atol=1e-4, rtol=1e-4)


def test_texts_that_datasets_share_are_read_once(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, east, known = load_model(str(tiny.folder() / "model"), device="cpu"), ProbeData(wheel).read("1_east"), {}
    alone = read_split(loaded, HookPoint(1), east, rows=48)
    first = read_split(loaded, HookPoint(1), east, rows=48, known=known)
    monkeypatch.setattr("qwen_scope.score.probing.last_residuals", lambda *_: pytest.fail("read again"))
    again = read_split(loaded, HookPoint(1), east, rows=48, known=known)
    assert torch.equal(first.x, again.x)
    torch.testing.assert_close(first.x, alone.x)


def test_the_cost_counts_a_text_that_datasets_share_once(tmp_path: Path) -> None:
    """And of a dataset those texts that are drawn, not its first ones."""
    texts = tmp_path / "c.jsonl"
    rows = [{"text": "word " * (i + 1), "n": str(i % 2)} for i in range(48)]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model, sae = (str(tiny.folder() / name) for name in ("model", "sae"))
    run = ScoreRun(sae, str(texts), tmp_path / "out", model, layers=(0,), controls=False, suites=("probes",),
                   columns=("n",), datasets=("n=0",))  # fmt: skip
    alone = cost(run).suites["probes"]
    assert alone == sum(min(len(row["text"]) // 4 + 1, 256) for row in rows)
    assert cost(replace(run, datasets=("n=0", "n=1"))).suites["probes"] == alone
    assert cost(replace(run, layers=(0, 2))).suites["probes"] == 2 * alone
    read = ColumnData(Corpus.of(str(texts), CorpusOptions(), shuffle=0, quiet=True), ("n",)).read("n=0")
    drawn = balanced_split(read.y, 28, 12)
    lengths = [len(read.texts[i]) // 4 + 1 for part in drawn for i in part.tolist()]
    assert cost(replace(run, rows=40)).suites["probes"] == sum(lengths)


def test_a_dataset_is_balanced_and_cut(wheel: Path) -> None:
    loaded, data = load_model(str(tiny.folder() / "model"), device="cpu"), ProbeData(wheel)
    split = read_split(loaded, HookPoint(1), data.read("1_east"), rows=49, tokens=2)
    assert (len(split.train), len(split.test)) == (34, 14)
    assert split.y[split.train].sum() == 17
    assert split.y[split.test].sum() == 7
    with pytest.raises(InputError, match="3_short has 2 texts"):
        read_split(loaded, HookPoint(1), data.read("3_short"))


def test_the_scoreboard_probes_and_goes_on(wheel: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    texts = tmp_path / "c.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{text} {i}" * 3}) + "\n" for i in range(24) for text in tiny.TEXTS))
    model, sae = (str(tiny.folder() / name) for name in ("model", "sae"))
    words = ["score", sae, str(texts), "--model", model, "-o", str(tmp_path / "o"), "--layers", "0", "--tokens", "128"]
    words += ["--context-length", "16", "--batch-size", "4", "--train-tokens", "64", "--batch", "64", "--device", "cpu"]
    words += ["--probes", str(wheel), "--datasets", "1_east", "--rows", "48", "--json"]
    assert main(words) == 0
    first = json.loads(capsys.readouterr().out)
    probes = first["probes"]["0"]
    assert set(probes) == {"trained", "frozen decoder", "frozen encoder", "random directions"}
    assert set(probes["trained"]["1_east"]) == {"1", "2", "5", "16", "residual"}
    assert set(probes["frozen decoder"]["1_east"]) == {"1", "2", "5", "16"}
    lines = (tmp_path / "o" / "probes.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "o" / "probes.jsonl").write_text("".join(lines[:2]))
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["probes"] == first["probes"]
    monkeypatch.setattr("qwen_scope.score.scoreboard.load_model", lambda *_, **__: pytest.fail("measured again"))
    assert main([*words[:-1], "--html", str(tmp_path / "b.html")]) == 0
    assert "sparse probing" in capsys.readouterr().out
    assert "sparse probing" in (tmp_path / "b.html").read_text()
    assert main([*words, "--datasets", "nothing"]) == 2
    assert "sae-probes has no dataset 'nothing'" in capsys.readouterr().err
