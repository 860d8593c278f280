"""Label batches of Neuronpedia come in and go out unchanged, are shown, and are refused where they do not fit."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from qwen_scope.cli import main
from qwen_scope.cli.show import print_page
from qwen_scope.errors import FormatError, InputError, NotFoundError
from qwen_scope.features import explanations_of, export_explanations, feature_page, import_explanations
from qwen_scope.store import FeatureStore

sys.path.insert(0, str(Path(__file__).parents[1] / "store"))
import stores

SOURCE = "2-toy-res-1k"


def record(number: int, text: str, **more) -> dict:
    """As its public batches have them, fields that we know nothing of among them."""
    return {
        "id": f"clx{number}", "modelId": "toy", "layer": SOURCE, "index": str(number), "description": text,
        "authorId": "u", "typeName": "np_acts-logits-general", "explanationModelName": "gemini-2.0-flash",
        "embedding": [0.1, -2.5e-07, 3.0], "triggeredByUserId": None, "notes": "ü\u2028",
    } | more  # fmt: skip


def batch(path: Path, *records: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records).encode()
    path.write_bytes(gzip.compress(lines, mtime=7) if path.suffix == ".gz" else lines)
    return path


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return stores.make(tmp_path / "store")


def test_in_and_out_unchanged(store: FeatureStore, tmp_path: Path) -> None:
    given = tmp_path / "given" / SOURCE
    files = [
        batch(given / "explanations" / "batch-0.jsonl.gz", record(0, "<b>greetings</b>"), record(3, "numbers")),
        batch(given / "explanations" / "batch-10.jsonl.gz", record(3, "digits", typeName="eleuther_acts_top20")),
    ]
    (given / "features").mkdir()
    (given / "features" / "batch-0.jsonl.gz").write_bytes(b"no explanation")
    assert import_explanations(store, given.parent) == 3
    assert import_explanations(store, given.parent) == 3  # once more changes nothing
    assert export_explanations(store, tmp_path / "back") == 2
    for file in files:
        assert (tmp_path / "back" / file.relative_to(given.parent)).read_bytes() == file.read_bytes()
    with FeatureStore(store.folder) as again:  # the store is still one
        again.verify()
        found = explanations_of(again, 2, 3)
        assert [(one.text, one.method) for one in found] == [
            ("numbers", "np_acts-logits-general"),
            ("digits", "eleuther_acts_top20"),
        ]
        assert explanations_of(again, 2, 1) == explanations_of(again, 0, 3) == ()
        html = feature_page(2, 0, store=again)._repr_html_()
    assert "greetings" in html
    assert "<b>greet" not in html
    assert "not scored here" in html


def test_the_command(store: FeatureStore, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = batch(tmp_path / "batch-3.jsonl", record(0, "greetings"))
    argv = ["label", str(store.folder), "--merge", str(file)]
    assert main(argv) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)["merged"] == 1
    print_page(feature_page(2, 0, store=store))
    assert "greetings (Neuronpedia by gemini-2.0-flash; not scored here)" in capsys.readouterr().out
    assert main(["export", str(store.folder), "--to", "neuronpedia-labels", "-o", str(tmp_path / "out")]) == 0, (
        capsys.readouterr().err
    )
    assert (tmp_path / "out" / SOURCE / "explanations" / "batch-3.jsonl").read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("records", "error"),
    [
        ([record(0, "x", layer="9-toy")], NotFoundError),
        ([record(0, "x", layer="../../x")], FormatError),
        ([record(10**6, "x")], NotFoundError),
        ([record(0, "x", index="-1")], FormatError),
        ([record(0, "x", index=None)], FormatError),
        ([{**record(0, ""), "description": None}], FormatError),
        ([record(0, "x"), record(0, "x", layer="0-other")], InputError),
        ([["x"]], FormatError),
        ([], InputError),
    ],
)
def test_what_does_not_fit_leaves_nothing(
    records: list, error: type[Exception], store: FeatureStore, tmp_path: Path
) -> None:
    fine = batch(tmp_path / "in" / "batch-0.jsonl.gz", record(1, "fine"))
    batch(fine.with_name("batch-1.jsonl.gz"), *records)
    with pytest.raises(error):
        import_explanations(store, tmp_path / "in")
    assert explanations_of(store, 2, 1) == ()
    with pytest.raises(NotFoundError):
        export_explanations(store, tmp_path / "out")
